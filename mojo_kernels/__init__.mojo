"""Custom ops: the mixture-of-experts layer (routing, grouping by expert, the experts), dense layers, rotary embedding.
"""

from .add_norm import Step3p5AddNorm, Step3p5Norm
from .assign import Step3p5MoeAssign
from .attend_gpu import Step3p5Attend
from .combine_gpu import Step3p5CombineReceive, Step3p5CombineSend
from .dense_layer import Step3p5DenseLayer
from .dispatch_gpu import Step3p5DispatchReceive, Step3p5DispatchSend
from .down import Step3p5MoeDown
from .gate_up import Step3p5MoeGateUp
from .greedy import Step3p5Greedy
from .group import Step3p5MoeGroup
from .head_gate import Step3p5HeadGate
from .linear import Step3p5Linear
from .linear4 import Step3p5Linear4
from .moe_layer import Step3p5MoeLayer
from .moe_shared import Step3p5MoeDownShared, Step3p5MoeGateUpShared
from .qkv import Step3p5Qkv
from .rope import RopeTable
from .route import Step3p5MoeRoute
from .swiglu import Step3p5Swiglu
