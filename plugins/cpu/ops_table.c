/* plugins/cpu/ops_table.c - one instruction set's functions, as a constant table. */
#include "cpu.h"

const phx__cpu_kernels phx__cpu_this_kernels = {.ops = {.struct_size = sizeof(phx_ops),
                                                        .linear = phx__cpu_linear,
                                                        .linear_backward_input = phx__cpu_linear_backward_input,
                                                        .linear_backward_weight = phx__cpu_linear_backward_weight,
                                                        .embedding = phx__cpu_embedding,
                                                        .embedding_backward = phx__cpu_embedding_backward,
                                                        .layer_norm = phx__cpu_layer_norm,
                                                        .layer_norm_backward = phx__cpu_layer_norm_backward,
                                                        .add = phx__cpu_add,
                                                        .attention = phx__cpu_attention,
                                                        .attention_backward = phx__cpu_attention_backward,
                                                        .cross_entropy = phx__cpu_cross_entropy,
                                                        .adamw = phx__cpu_adamw,
                                                        .sgd = phx__cpu_sgd,
                                                        .block_norms = phx__cpu_block_norms,
                                                        .mean = phx__cpu_mean},
                                                .attention_scratch = phx__cpu_attention_scratch,
                                                .cast = phx__cpu_slice_cast,
                                                .add = phx__cpu_slice_add,
                                                .scale = phx__cpu_slice_scale};
