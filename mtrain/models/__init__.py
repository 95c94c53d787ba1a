"""Hugging Face models: built or loaded exactly, refused by name, attached to sparse ring attention."""

from mtrain.models.attach import attach, detach
from mtrain.models.build import load_model
from mtrain.models.context import RingContext
from mtrain.models.loss import install_loss_head, scaled_loss

__all__ = ["RingContext", "attach", "detach", "install_loss_head", "load_model", "scaled_loss"]
