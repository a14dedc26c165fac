/* SPDX-License-Identifier: MIT
 *
 * Undefined bits of registers: what `machine.definedness` does in Python. A register with some has a
 * shadow, a row of those bits, and its row has any values in their place.
 *
 * An instruction is executed with these values. Before that `find_bits` finds which bits of its
 * results are undefined, or leaves to Python what may be a fault; then `mark_results` notes them.
 */

#include "core.c"

static const _Alignas(64) uint8_t DEFINED[ROW];

/* The undefined bits of a register, a constant or a special register. */
static inline const uint8_t *shadow(const Warp *w, int32_t n)
{
    return w->states[n] & UNDEFINED ? w->undefined + (int64_t)ROW * n : DEFINED;
}

/* All bits of a value: a predicate has one. */
static inline int all_bits(int width) { return width == 1 ? 1 : 0xFF; }

static inline int has_any(const uint8_t *bits, int width)
{
    int any = 0;
    for (int k = 0; k < width; k++)
        any |= bits[k];
    return any != 0;
}

/* The threads of a mask of whose value one of the lowest bytes has an undefined bit. */
static uint32_t undefined_threads(const Warp *w, int32_t n, uint32_t mask, int bytes)
{
    const int width = w->widths[n];
    const uint8_t *bits = shadow(w, n);
    uint32_t found = 0;
    for (int k = 0; k < LANES && bits != DEFINED; k++)
        found |= (uint32_t)(mask >> k & 1 && has_any(bits + k * width, bytes)) << k;
    return found;
}

/* Forget the undefined bits of the threads that have been written. Return whether others have any. */
static __attribute__((noinline)) int keep_undefined(Warp *w, int32_t n, uint32_t mask)
{
    const int width = w->widths[n];
    uint8_t *bits = w->undefined + (int64_t)ROW * n;
    for (int k = 0; k < LANES; k++)
        if (mask >> k & 1)
            memset(bits + k * width, 0, (size_t)width);
    return has_any(bits, LANES * width);
}

/* Let bits of a register be undefined, too, in the threads of the mask. */
static void mark_undefined(Warp *w, int32_t n, const uint8_t *bits, uint32_t mask, int32_t cause)
{
    const int width = w->widths[n];
    uint8_t *to = w->undefined + (int64_t)ROW * n;
    if (!(w->states[n] & UNDEFINED))
        memset(to, 0, (size_t)(LANES * width));
    for (int k = 0; k < LANES * width; k++)
        to[k] |= mask >> k / width & 1 ? bits[k] : 0;
    if (!has_any(to, LANES * width))
        return;
    w->states[n] = UNDEFINED;
    w->causes[n] = cause;
}

/* Let all bits of a register be undefined that was never written. */
static void make_undefined(Warp *w, int32_t n, int32_t cause)
{
    const int width = w->widths[n];
    memset(w->undefined + (int64_t)ROW * n, all_bits(width), (size_t)(LANES * width));
    w->states[n] = UNDEFINED;
    w->causes[n] = cause;
    w->versions[n]++;
}

/* `registers.left_out_values`. */
static void fill(Warp *w, const Instruction *i, int32_t n)
{
    uint64_t key = w->seed, words[LANES];
    const uint64_t parts[3] = {(uint64_t)(int64_t)w->block, (uint64_t)w->index, (uint64_t)n};
    for (int k = 0; k < 3; k++)
        key = (key ^ parts[k]) * 0x9E3779B97F4A7C15u + 1;
    for (int k = 0; k < LANES; k++) {
        uint64_t word = key + (uint64_t)k * 0x9E3779B97F4A7C15u;
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9u;
        word = (word ^ word >> 27) * 0x94D049BB133111EBu;
        words[k] = word ^ word >> 31;
    }
    memcpy(row(w, n), words, ROW);
    for (int k = 0; k < LANES && w->widths[n] == 1; k++)
        row(w, n)[k] = ((const uint8_t *)words)[k] > 127;
    make_undefined(w, n, LEFT_OUT + (int32_t)(i - w->program));
}

/* Whether the threads that an instruction leaves out keep what they have of a result; undefined bits
   if it was never written. */
static __attribute__((noinline)) int may_be_kept(Warp *w, const Instruction *i, int n)
{
    if (w->states[i->to[n]] & NEVER)
        fill(w, i, i->to[n]);
    return w->states[i->to[n]] & UNDEFINED;
}

static void find_by_thread(const Warp *w, const Instruction *i, int is_of_warp, Bits *bits)
{
    uint32_t threads = 0;
    for (int n = 0; n < i->sources; n++)
        threads |= undefined_threads(w, i->from[n], ALL, w->widths[i->from[n]]);
    if (is_of_warp)
        threads = ALL;
    for (int n = 0; n < i->results; n++) {
        const int width = i->to[n] < 0 ? 0 : w->widths[i->to[n]];
        for (int k = 0; k < LANES; k++)
            memset(bits->of[n] + k * width, threads >> k & 1 ? all_bits(width) : 0, (size_t)width);
    }
}

/* Bits that are moved are undefined where the same instruction moves undefined bits to. Return 0 if
   others of its operands are undefined. */
static int find_moved(Warp *w, const Instruction *i, uint32_t mask, Bits *bits)
{
    const uint8_t *from[OPERANDS] = {0};
    uint8_t valid[LANES];
    for (int n = 0; n < i->sources; n++) {
        const int is_moved = i->moved >> n & 1 || i->kind == PACK;
        if (!is_moved && w->states[i->from[n]] & UNDEFINED)
            return 0;
        from[n] = is_moved ? shadow(w, i->from[n]) : row(w, i->from[n]);
    }
    if (i->kind == PACK)
        pack_rows(w, i, from, bits->of);
    else if (i->kind == SHUFFLE) {
        uint32_t result[LANES];
        if (!shuffle_values(w, i, mask, (const void *)from[0], result, valid))
            return -1;
        memcpy(bits->of[0], result, sizeof result);
    } else
        i->function(bits->of[0], from[0], from[1], from[2]);
    for (int n = 0; n < i->results; n++)
        if (i->to[n] >= 0 && w->widths[i->to[n]] == 1) /* a predicate is defined */
            memset(bits->of[n], 0, ROW);
    return 1;
}

static void find_of_halves(const Warp *w, const Instruction *i, Bits *bits)
{
    uint16_t *to = (void *)bits->of[0];
    memset(to, 0, ROW);
    for (int n = 0; n < i->sources; n++) {
        const uint16_t *from = (void *)shadow(w, i->from[n]);
        for (int k = 0; k < 2 * LANES; k++)
            to[k] |= from[k] ? 0xFFFF : 0;
    }
}

static void find_joined(const Warp *w, const Instruction *i, Bits *bits)
{
    const uint32_t *upper = (void *)shadow(w, i->from[0]), *lower = (void *)shadow(w, i->from[1]);
    for (int k = 0; k < LANES; k++)
        ((uint32_t *)bits->of[0])[k] = (upper[k] ? 0xFFFF0000u : 0) | (lower[k] ? 0xFFFF : 0);
}

/* A bit is defined where one operand is a defined 0, or of `or` a defined 1. */
static void find_logical(const Warp *w, const Instruction *i, Bits *bits)
{
    const uint8_t *of_a = shadow(w, i->from[0]), *a = row(w, i->from[0]);
    const uint8_t *of_b = i->sources > 1 ? shadow(w, i->from[1]) : DEFINED;
    const uint8_t *b = i->sources > 1 ? row(w, i->from[1]) : DEFINED;
    const int size = LANES * w->widths[i->to[0]];
    for (int k = 0; k < size; k++) {
        const int both = of_a[k] | of_b[k];
        const int found = i->rule == OF_AND  ? both & (of_a[k] | a[k]) & (of_b[k] | b[k])
                          : i->rule == OF_OR ? both & (of_a[k] | ~a[k]) & (of_b[k] | ~b[k])
                                             : both;
        bits->of[0][k] = (uint8_t)found;
    }
}

/* Sums and products of integers: bits below the lowest undefined one are defined. */
static void find_of_sum(const Warp *w, const Instruction *i, Bits *bits)
{
    const int width = w->widths[i->to[0]];
    for (int k = 0; k < LANES; k++) {
        uint64_t together = 0;
        for (int n = 0; n < i->sources; n++) {
            const int own = w->widths[i->from[n]];
            uint64_t one = 0;
            memcpy(&one, shadow(w, i->from[n]) + k * own, (size_t)(own < width ? own : width));
            together |= one;
        }
        together |= 0 - together;
        memcpy(bits->of[0] + k * width, &together, (size_t)width);
    }
}

/* Return 0 if the choice itself is undefined. */
static int find_selected(const Warp *w, const Instruction *i, Bits *bits)
{
    const int width = w->widths[i->to[0]];
    const uint8_t *choice = row(w, i->from[2]);
    if (w->states[i->from[2]] & UNDEFINED)
        return 0;
    for (int k = 0; k < LANES; k++)
        memcpy(bits->of[0] + k * width, shadow(w, i->from[!choice[k]]) + k * width, (size_t)width);
    return 1;
}

/* The cause of the first of an instruction's registers that has undefined bits and is read. */
static int32_t first_cause(const Warp *w, const Instruction *i)
{
    for (int n = 0; n < i->results; n++)
        for (int k = 0; k < i->sources; k++)
            if (i->to[n] == i->from[k] && w->states[i->to[n]] & UNDEFINED)
                return w->causes[i->to[n]];
    for (int n = 0; n < i->sources; n++)
        if (w->states[i->from[n]] & UNDEFINED)
            return w->causes[i->from[n]];
    return UNINITIALISED;
}

/* Find which bits of the results are undefined. Return 0 if Python must execute the instruction:
   undefined bits matter, or an operand is of an asynchronous product. */
static __attribute__((noinline)) int find_bits(Warp *w, const Instruction *i, uint32_t mask,
                                               Bits *bits)
{
    for (int n = 0; n < i->sources; n++) {
        const int32_t source = i->from[n];
        if (w->states[source] & NEVER) {
            memset(row(w, source), 0, ROW);
            make_undefined(w, source, UNINITIALISED);
        }
        if (!in_row(w, source) && !(w->states[source] & UNDEFINED))
            return 0;
    }
    bits->cause = first_cause(w, i);
    switch (i->kind) {
    case STORE:
        for (int n = 1; n < i->sources; n++)
            if (undefined_threads(w, i->from[n], mask, i->width))
                return 0;
        return !undefined_threads(w, i->from[0], mask, w->widths[i->from[0]]);
    case LOAD:
        for (int n = 0; n < i->results; n++)
            memset(bits->of[n], 0, ROW);
        return !undefined_threads(w, i->from[0], mask, w->widths[i->from[0]]);
    case ELEMENTWISE:
    case PACK:
    case SHUFFLE:
    case PRODUCT:
    case REDUCE:
    case VOTE:
    case MATCH: break;
    default: return 0;
    }
    int found = 0;
    switch (i->rule) {
    case MOVED: found = find_moved(w, i, mask, bits); break;
    case OF_AND:
    case OF_OR:
    case OF_EITHER: find_logical(w, i, bits); return 1;
    case OF_SUM: find_of_sum(w, i, bits); return 1;
    case OF_HALVES: find_of_halves(w, i, bits); return 1;
    case JOINED: find_joined(w, i, bits); return 1;
    case SELECTED: found = find_selected(w, i, bits); break;
    }
    if (!found)
        find_by_thread(w, i, i->rule == OF_WARP, bits);
    return found >= 0;
}

static void mark_results(Warp *w, const Instruction *i, uint32_t mask, const Bits *bits)
{
    for (int n = 0; n < i->results; n++)
        if (i->to[n] >= 0)
            mark_undefined(w, i->to[n], bits->of[n], mask, bits->cause);
}
