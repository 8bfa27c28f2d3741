"""Custom ops: the mixture-of-experts layer (routing, grouping by expert, the experts), dense layers, rotary embedding.
"""

from .assign import Step3p5MoeAssign
from .attend_gpu import Step3p5Attend
from .attention_block import Step3p5AttentionBlock
from .down import Step3p5MoeDown
from .gate_up import Step3p5MoeGateUp
from .group import Step3p5MoeGroup
from .linear import Step3p5Linear
from .linear4 import Step3p5Linear4
from .mlp_block import Step3p5MlpBlock
from .moe_block import Step3p5MoeBlock
from .qkv import Step3p5Qkv
from .rope import RopeTable
from .route import Step3p5MoeRoute
from .swiglu import Step3p5Swiglu
