"""Kernels for efficient sequence models: arrays in, arrays out, one public function per op."""

from pallas_kernels.attention.op import attention as attention
from pallas_kernels.block_sparse_attention.op import block_sparse_attention as block_sparse_attention
from pallas_kernels.delta_rule.op import delta_rule as delta_rule
from pallas_kernels.diagonal_scan.op import diagonal_scan as diagonal_scan
from pallas_kernels.generalized_delta_rule.op import generalized_delta_rule as generalized_delta_rule
from pallas_kernels.grouped_matmul.op import grouped_matmul as grouped_matmul
from pallas_kernels.linear_attention.op import linear_attention as linear_attention
from pallas_kernels.linear_cross_entropy.op import linear_cross_entropy as linear_cross_entropy
from pallas_kernels.selective_scan.op import selective_scan as selective_scan
from pallas_kernels.short_conv.op import short_conv as short_conv
