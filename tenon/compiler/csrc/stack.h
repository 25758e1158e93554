// A decoder's layers as one call: weights, sizes and cache of each. Mirrored by executors/stack.py.
#ifndef TENON_STACK_H
#define TENON_STACK_H

#include <stdint.h>

typedef struct {
    const void *attn_norm, *mlp_norm;
    const void *q_norm, *k_norm;           // NULL where the model has none
    const void *qkv, *qkv_bias;            // packed products; a bias is NULL where there is none
    const void *out, *out_bias;
    const void *gate_up, *gate_up_bias;    // of a sparse layer: its experts' one after another
    const void *down, *down_bias;
    const void *router;                    // NULL in a dense layer
    void *k_cache, *v_cache;
    int64_t group;                         // which of the step's attend_step
    int64_t width;                         // F: of the gate, of one expert's in a sparse layer
} stack_layer;

typedef struct {
    int64_t n_layers, hidden, n_heads, n_kv_heads, head_dim;
    int64_t n_experts, top_k, normalise;   // 0 in a model without sparse layers
    int64_t width;                         // the largest of the layers' in rows of T: F, or F x top_k of a sparse one
    double eps, scale;
    const stack_layer *layers;
    const void *norm;
} stack;

#endif
