from .explain import Words as Words
from .explain import attention_maps as attention_maps
from .explain import attention_weights as attention_weights
from .explain import coupling_moves as coupling_moves
from .explain import draw as draw
from .explain import nearest_words as nearest_words
