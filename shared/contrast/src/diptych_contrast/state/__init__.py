"""State that training carries along: temperature, queues of embeddings, momentum encoder.

Every module here keeps all of its state in tensors and stores a version beside them.
"""

from diptych_contrast.state.momentum import MomentumEncoder, cosine_momentum
from diptych_contrast.state.queues import CrossBatchMemory, KeyQueue
from diptych_contrast.state.temperature import Temperature

__all__ = ["CrossBatchMemory", "KeyQueue", "MomentumEncoder", "Temperature", "cosine_momentum"]
