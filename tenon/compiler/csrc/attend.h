// What one step's attention needs besides queries, keys, values and the cache. Built once per step and group.
#ifndef TENON_ATTEND_H
#define TENON_ATTEND_H

#include <stdint.h>

typedef struct {
    int64_t n_rows, n_items;
    int64_t n_heads, n_kv_heads, head_dim, n_blocks, block_tokens;
    int64_t window;              // positions a row sees, itself included; 0: all
    const int32_t *pos;          // [T] position of each row
    const int32_t *base;         // [T] last position that is read through the table: pos, or the tree root's
    const int32_t *parent;       // [T] row of the tree parent, -1: chain
    const int32_t *slot;         // [T] where the row's K and V are written
    const int32_t *table;        // block of each position block, CSR over spans
    const int32_t *item_row;     // [n_items] first row
    const int32_t *item_n;       // [n_items] rows: consecutive ones of one span; rows of trees have its largest base
    const int32_t *item_table;   // [n_items] start of the span's table
} attend_step;

#endif
