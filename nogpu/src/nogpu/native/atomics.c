/* SPDX-License-Identifier: MIT
 *
 * Atomics and reductions, of one thread after the other: what `atomics` does in Python, but for
 * fences.
 */

#include "knowledge.c"

/* Functions of one element: the old value, an operand, and that of cas. */

#define ONE(NAME, TYPE, VALUE)                                                             \
    static void one_##NAME(void *to, const void *from_a, const void *from_b,               \
                           const void *from_c)                                             \
    {                                                                                      \
        TYPE a, b, c = 0, d;                                                               \
        memcpy(&a, from_a, sizeof a);                                                      \
        memcpy(&b, from_b, sizeof b);                                                      \
        if (from_c)                                                                        \
            memcpy(&c, from_c, sizeof c);                                                  \
        (void)c;                                                                           \
        d = (TYPE)(VALUE);                                                                 \
        memcpy(to, &d, sizeof d);                                                          \
    }
#define OF_BITS(BITS)                                                                      \
    ONE(exch_##BITS, uint##BITS##_t, b)                                                    \
    ONE(cas_##BITS, uint##BITS##_t, a == b ? c : a)
#define OF_WORDS(BITS)                                                                     \
    OF_BITS(BITS)                                                                          \
    ONE(add_##BITS, uint##BITS##_t, a + b)                                                 \
    ONE(and_##BITS, uint##BITS##_t, a & b)                                                 \
    ONE(or_##BITS, uint##BITS##_t, a | b)                                                  \
    ONE(xor_##BITS, uint##BITS##_t, a ^ b)                                                 \
    ONE(min_s##BITS, int##BITS##_t, a < b ? a : b)                                         \
    ONE(max_s##BITS, int##BITS##_t, a > b ? a : b)                                         \
    ONE(min_u##BITS, uint##BITS##_t, a < b ? a : b)                                        \
    ONE(max_u##BITS, uint##BITS##_t, a > b ? a : b)                                        \
    ONE(inc_##BITS, uint##BITS##_t, a >= b ? 0 : a + 1)                                    \
    ONE(dec_##BITS, uint##BITS##_t, a == 0 || a > b ? b : a - 1)
OF_BITS(16)
OF_WORDS(32)
OF_WORDS(64)
ONE(add_f32, float, a + b)
ONE(add_f64, double, a + b)
ONE(add_f16, uint16_t, to_f16(of_f16(a) + of_f16(b)))
ONE(add_bf16, uint16_t, to_bf16(of_bf16(a) + of_bf16(b)))
#define OF_TWO(KIND)                                                                       \
    static void one_add_##KIND##x2(void *to, const void *a, const void *b, const void *c)  \
    {                                                                                      \
        one_add_##KIND(to, a, b, c);                                                       \
        one_add_##KIND((uint8_t *)to + 2, (const uint8_t *)a + 2, (const uint8_t *)b + 2, c); \
    }
OF_TWO(f16)
OF_TWO(bf16)

typedef struct {
    const char *name;
    Elementwise *function;
} AtomicEntry;

#define ATOMICS_OF(BITS)                                                                   \
    {"exch.b" #BITS, one_exch_##BITS}, {"cas.b" #BITS, one_cas_##BITS},                    \
    {"and.b" #BITS, one_and_##BITS}, {"or.b" #BITS, one_or_##BITS},                        \
    {"xor.b" #BITS, one_xor_##BITS}, {"add.u" #BITS, one_add_##BITS},                      \
    {"add.s" #BITS, one_add_##BITS}, {"min.s" #BITS, one_min_s##BITS},                     \
    {"max.s" #BITS, one_max_s##BITS}, {"min.u" #BITS, one_min_u##BITS},                    \
    {"max.u" #BITS, one_max_u##BITS}, {"inc.u" #BITS, one_inc_##BITS},                     \
    {"dec.u" #BITS, one_dec_##BITS}

static const AtomicEntry ATOMIC_ENTRIES[] = {
    ATOMICS_OF(32), ATOMICS_OF(64), {"exch.b16", one_exch_16}, {"cas.b16", one_cas_16},
    {"add.f32", one_add_f32}, {"add.f64", one_add_f64}, {"add.f16", one_add_f16},
    {"add.bf16", one_add_bf16}, {"add.f16x2", one_add_f16x2}, {"add.bf16x2", one_add_bf16x2},
};

/* Return the function of an atomic, or null. */
void *atomic_of(const char *name)
{
    for (unsigned n = 0; n < sizeof ATOMIC_ENTRIES / sizeof *ATOMIC_ENTRIES; n++)
        if (strcmp(ATOMIC_ENTRIES[n].name, name) == 0)
            return (void *)ATOMIC_ENTRIES[n].function;
    return 0;
}

/* `memory.Space.change` without a fault: whether it has none. Atomics at one place do not race. */
static int may_change(const Warp *w, const Access *at, int width, int reads, int is_atomic)
{
    const Allocation *place = at->place;
    const uint8_t *atomic = w->events->atomic;
    if (hits_barrier(place, at->least, at->most + width))
        return 0;
    for (int n = 0; n < at->count; n++) {
        const int64_t first = at->offsets[n] / place->unit;
        begin(place, first, first + width / place->unit);
        for (int64_t k = first; k < first + width / place->unit; k++) {
            const int32_t writer = place->writes[k], reader = place->reads[k];
            const int32_t other = place->others ? place->others[k] : GIVEN;
            if ((reads || writer != UNWRITTEN) && knows(w, writer) != 1 &&
                !(is_atomic && atomic[writer]))
                return 0;
            if (w->swaps)
                continue; /* the readers' atomicCAS notices a change */
            if (knows(w, reader) != 1 && !(is_atomic && atomic[reader]))
                return 0;
            if (knows(w, other) != 1 && !(is_atomic && atomic[other]))
                return 0;
        }
    }
    return 1;
}

/* Change the elements, and return what they were. */
static void change(Warp *w, const Instruction *i, const Access *at, int n, uint8_t *old)
{
    const int width = i->width;
    const uint8_t *first = row(w, i->from[1 + n]);
    const uint8_t *second = i->sources > 1 + i->count ? row(w, i->from[1 + i->count + n]) : 0;
    int has_changed = 0;
    for (int k = 0; k < at->count; k++) {
        const int lane = at->lanes[k] * width;
        uint8_t *where = at->place->data + at->offsets[k], result[8];
        memcpy(old + lane, where, (size_t)width);
        i->function(result, where, first + lane, second ? second + lane : 0);
        if (!memcmp(where, result, (size_t)width))
            continue;
        has_changed++;
        keep(w, at->place, where, width);
        memcpy(where, result, (size_t)width);
    }
    w->stores += space_of(w, i) == 0 ? has_changed : 0;
}

/* `Block.spin`: whether an atomic has found what it found before. */
static int finds_the_same(Warp *w, const Instruction *i, const Access *at,
                          uint8_t (*values)[LANES * 8])
{
    Runner *r = w->runner;
    Found *found = &r->found[w->index * r->atomics + i->target];
    const size_t size = (size_t)at->count * sizeof *at->offsets;
    if (found->place == at->place && found->count == at->count &&
        !memcmp(found->offsets, at->offsets, size) &&
        !memcmp(found->values, values, sizeof found->values))
        return 1;
    found->place = at->place;
    found->count = at->count;
    memcpy(found->offsets, at->offsets, size);
    memcpy(found->values, values, sizeof found->values);
    return 0;
}

static void begin_atomics(Runner *r)
{
    const size_t count = (size_t)r->warp_count * (size_t)r->atomics;
    r->spins = 0;
    if (count && !r->found && !(r->found = malloc(count * sizeof *r->found)))
        abort();
    for (size_t n = 0; n < count; n++)
        r->found[n].place = 0;
}

static int atomic(Warp *w, const Instruction *i, uint32_t mask)
{
    uint8_t old[MOST_ELEMENTS][LANES * 8] = {{0}};
    Access at;
    const int width = i->width, is_global = space_of(w, i) == 0;
    if (w->events->count + i->count > w->events->capacity)
        return GROW;
    if (!locate(w, i, mask, width, LANES, &at))
        return PYTHON;
    const uint64_t base = at.place->base;
    if (is_global && i->is_atomic && i->releases) {
        Known *known = snapshot(w);
        for (int k = 0; k < at.count; k++)
            release(w, base + (uint64_t)at.offsets[k], known);
    }
    count_access(w, i, &at, width * i->count);
    Access first = at;
    for (int n = 0; n < i->count; n++) {
        if (n && !locate_at(w, i->from[0], i->offset + n * width, w->spaces[space_of(w, i)], mask, width,
                            LANES, &at))
            return PYTHON;
        if (!may_change(w, &at, width, i->mode, i->is_atomic))
            return PYTHON;
        const int32_t event =
            add_event(w, i->line, w->atomic_name, w->index, w->times[w->index]);
        w->events->atomic[event] = i->is_atomic;
        note_write(w, &at, width, event);
        uint8_t *touched = is_global ? touched_by(i, at.place) : 0;
        for (int k = 0; touched && k < at.count; k++)
            touched[at.offsets[k] / 32] = 1;
        change(w, i, &at, n, old[n]);
    }
    for (int n = 0; n < i->results; n++)
        if (i->to[n] >= 0)
            put(w, i->to[n], old[n], mask);
    if (!is_global)
        return BUDGET;
    if (i->is_atomic && i->acquires)
        for (int k = 0; k < first.count; k++)
            acquire(w, base + (uint64_t)first.offsets[k]);
    if (finds_the_same(w, i, &first, old) && ++w->runner->spins >= SPINS)
        return PYTHON; /* other blocks may run meanwhile */
    return BUDGET;
}
