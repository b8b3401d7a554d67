"""What the zoo knows and where it gets it from: registry, factory, CLIP's weights, the Hub, timm."""
