"""Where a model is: a directory, or a name on the Hugging Face Hub, whose files are downloaded once.

The Hub's own variables hold: HF_HOME and HF_HUB_CACHE (where), HF_TOKEN (for models with a licence), HF_ENDPOINT,
HF_HUB_OFFLINE. huggingface_hub is imported where it is used: it takes HOME as it finds it then (see cache.py).
"""

import re
from pathlib import Path

from ensemble.errors import ModelError
from ensemble.models.model_files import WANTED, other_format

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # org/name
_TEXT_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
]
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]
_HUB_TIMEOUT_S = 10.0


def resolve_model(name_or_path: str | Path) -> Path:
    """The directory of a model. One that exists is taken as it is; else `org/name` is looked up on the Hub, whose
    files go to its cache; if the Hub cannot be asked, what is in the cache is taken.

    Weights come as safetensors, and as `.bin` only where there are none. Raises ModelError in one line. A path that
    is neither is returned for its reader to refuse.
    """
    name = str(name_or_path)
    if Path(name).is_dir() or not _HUB_NAME.fullmatch(name):
        return Path(name)
    from huggingface_hub import HfApi, snapshot_download

    try:
        listing = HfApi().model_info(name, timeout=_HUB_TIMEOUT_S).siblings or []
    except Exception as error:  # the classes differ between releases, and with the transport
        return _cached(name, error)
    names = [file.rfilename for file in listing]
    if not any(name in (*_SAFETENSORS, *_PICKLES) for name in names) and (other := other_format(names)):
        raise ModelError(f"model {name}: on the Hub it {other}; {WANTED}")
    has_safetensors = any(name in _SAFETENSORS for name in names)
    patterns = _TEXT_FILES + (_SAFETENSORS if has_safetensors else _PICKLES)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(f"model {name}: the download failed: {_one_line(error)}") from None


def _cached(name: str, error: Exception) -> Path:
    """What an earlier download left in the cache. `error` says why the Hub was of no help."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_TEXT_FILES, local_files_only=True))
    except Exception:
        message = f"model {name}: no such directory, not in the Hugging Face cache, {_advice(name, error)}"
        raise ModelError(message) from None


def _advice(name: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "and behind a licence: accept it on the model's page, and set HF_TOKEN to a token of that account"
    if isinstance(error, RepositoryNotFoundError):
        return "and not on the Hub under this name, or private: then set HF_TOKEN"
    return (
        f"and the Hub cannot be asked ({_one_line(error)}): where it can be, run `hf download {name} --local-dir DIR`,"
        " and give that directory"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
