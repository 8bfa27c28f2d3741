"""Custom ops: the mixture-of-experts layer (routing, grouping by expert, the experts), dense layers, rotary embedding.
"""

from .assign import Step3p5MoeAssign
from .dense_layer import Step3p5DenseLayer
from .down import Step3p5MoeDown
from .gate_up import Step3p5MoeGateUp
from .group import Step3p5MoeGroup
from .linear import Step3p5Linear
from .linear4 import Step3p5Linear4
from .moe_layer import Step3p5MoeLayer
from .qkv import Step3p5Qkv
from .rope import RopeTable
from .route import Step3p5MoeRoute
from .swiglu import Step3p5Swiglu
