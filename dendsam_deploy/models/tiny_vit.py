"""MobileSAM's image encoder."""
from torch import nn
class TinyViTEncoder(nn.Module):
    def __init__(self, image_size: int) -> None:
        super().__init__()
