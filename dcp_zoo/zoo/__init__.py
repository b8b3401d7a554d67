"""The model zoo: registry, factory, CLIP's weights, the Hub, timm."""
