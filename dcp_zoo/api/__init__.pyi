from .attention import attention_maps as attention_maps
from .attention import attention_weights as attention_weights
