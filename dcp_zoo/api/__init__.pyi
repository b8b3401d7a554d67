from .functions import attention_maps as attention_maps
from .functions import attention_weights as attention_weights
