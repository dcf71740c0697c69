from pallas_kernels.delta_rule.op import delta_rule as delta_rule
from pallas_kernels.linear_attention.op import linear_attention as linear_attention
