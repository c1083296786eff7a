from ensemble.serving.home_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
