from ensemble.serving.stage_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
