from .api.estimator import FewShotClassifier as FewShotClassifier
from .api.functions import evaluate as evaluate
from .api.functions import predict as predict
from .api.functions import train as train
from .api.inputs import list_labelled_images as list_labelled_images
from .data.packaged import list_datasets as list_datasets
from .errors import UnreadableImages as UnreadableImages
from .errors import ZooError as ZooError
from .heads.checkpoint import load_head as load_head
from .heads.config import DCPConfig as DCPConfig
from .heads.dcp import DCP as DCP
from .inspection.inspection import inspect as inspect
from .inspection.search import search as search
from .inspection.search import suggest as suggest
from .onnx.export import export as export
from .prediction import Predictor as Predictor
from .release import push_to_hub as push_to_hub
from .zoo.dcp import model_entrypoint as model_entrypoint
from .zoo.factory import create_model as create_model
from .zoo.factory import create_transform as create_transform
from .zoo.registry import is_model as is_model
from .zoo.registry import list_heads as list_heads
from .zoo.registry import list_models as list_models
from .zoo.registry import list_pretrained as list_pretrained
from .zoo.resolve import get_pretrained_cfg as get_pretrained_cfg
from .zoo.resolve import get_pretrained_cfg_value as get_pretrained_cfg_value

__version__: str
