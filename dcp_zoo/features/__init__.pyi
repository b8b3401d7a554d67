from .cache import FeatureCache as FeatureCache
from .cache import kept_features as kept_features
from .cache import shared_features as shared_features
from .cache import users_cache as users_cache
from .device import autocast as autocast
from .device import decoders as decoders
from .device import pick_device as pick_device
from .device import pick_precision as pick_precision
from .extract import FeatureExtractor as FeatureExtractor
from .extract import is_plain_reading as is_plain_reading
from .groups import comparable as comparable
from .groups import group_images as group_images
from .groups import group_own_images as group_own_images
from .groups import looks_few as looks_few
from .groups import with_subjects as with_subjects
from .loader import Batch as Batch
from .loader import ImageLoader as ImageLoader
from .photos import CACHE_BYTES as CACHE_BYTES
from .photos import Photos as Photos
from .table import FeatureTable as FeatureTable
from .table import LabelledItems as LabelledItems
from .views import MIRRORED as MIRRORED
from .views import PLAIN as PLAIN
from .views import Views as Views
from .views import crop_views as crop_views

LIBRARIES: tuple[str, ...]
PRECISIONS: tuple[str, ...]
AUTO: str
MANY: int
