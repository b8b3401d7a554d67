from .explain import attention_maps as attention_maps
from .explain import attention_weights as attention_weights
