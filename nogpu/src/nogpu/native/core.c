/* SPDX-License-Identifier: MIT
 *
 * The common instructions of a warp, executed in C: what `machine`, `arithmetic`, `copies` and
 * `memory` do in Python, at several hundred times their speed.
 *
 * `run` executes instructions until it meets one that it leaves to Python: one that it does not
 * know, or one that may be a fault, as where undefined bits matter. It checks first, and changes
 * registers and memory only if nothing is wrong. So each fault is found and named by Python alone,
 * and both executors give the same values, undefined bits, events and faults.
 *
 * A register is a row of 256 bytes with the values of 32 threads. Constants and special registers
 * have rows, too, behind those of the registers.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 32
#define ROW 256
#define ALL 0xFFFFFFFFu
#define OPERANDS 16
#define MOST_UNDONE (1 << 26) /* bytes */
#define MOST_STORED 128       /* bytes that a thread stores */
#define MOST_LOADED 64        /* bytes that it loads, of which some are undefined */
#define GIVEN 0
#define UNWRITTEN 1
#define PAGE 4096 /* bytes */
#define GENERIC 3 /* the space of an address that tells it */
#define MOST_GROUPS 40
#define MANY 32 /* `allocation.MANY` */

/* Why `run` returns. */
enum { BUDGET, PYTHON, GROW, REACHED, STOPPED, REFINE };
/* How an instruction is executed. */
enum {
    LEFT, ELEMENTWISE, BRANCH, LOAD, STORE, SHUFFLE, PACK, LOAD_MATRIX, PRODUCT, NOTHING, COPY,
    ELECT, STORE_MATRIX, REDUCE,
    /* Of threads that diverge: simt.c. */
    VOTE, MATCH, ACTIVE, SYNC_WARP, BRANCH_INDEX,
    /* Where a block is executed as a whole: blocks.c, atomics.c, and tma.c. */
    RETURN, BARRIER, COMMIT, WAIT, PROXY_FENCE, PRODUCT_FENCE, ASYNC_PRODUCT, ATOMIC,
    MBARRIER_INIT, MBARRIER_INVAL, MBARRIER_ARRIVE, MBARRIER_WAIT, LOAD_BOX, STORE_BOX,
    BULK_COMMIT, BULK_WAIT, MAP_REPLACE, MAP_PUBLISH, MAP_ACQUIRE, GRID_WAIT, GRID_TRIGGER
};
/* The numbers of an instruction, as in `instruction_counts.Column`. */
enum {
    EXECUTIONS, THREADS, REQUESTS, BYTES, SECTORS, LEAST_SECTORS, SHARED_REQUESTS, SHARED_BYTES,
    WAVEFRONTS, LEAST_WAVEFRONTS, TENSOR_FLOPS, WAITS, IN_FLIGHT, MOST_IN_FLIGHT, COLUMNS
};
/* The state of a register: its row is up to date, and all of it is defined; Python has it in a list;
   an asynchronous product will write it; its row is up to date, and its shadow has the bits that are
   undefined (definedness.c); nobody has written it. */
enum { IN_ROW = 1, IN_LIST = 2, PENDING = 4, UNDEFINED = 8, NEVER = 16 };
/* Why bits are undefined: the register was never written; or that, and the index of an instruction
   that has left out their threads. Python has further numbers. */
enum { UNINITIALISED, LEFT_OUT };
/* How undefined bits of operands make those of the results: `definedness._propagate`. */
enum {
    OF_THREADS, /* all bits of a thread that has an undefined one */
    OF_WARP,    /* all bits of all threads */
    MOVED,      /* where the instruction moves them: `definedness.MOVES` */
    OF_AND, OF_OR, OF_EITHER,
    OF_SUM,     /* the lowest one, and those above it */
    OF_HALVES,  /* of a pair of halves, each by itself */
    JOINED,     /* a pair is made of two numbers */
    SELECTED    /* those of the operand that a predicate chooses */
};

typedef void Elementwise(void *to, const void *a, const void *b, const void *c);

typedef struct {
    int32_t kind, guard, target, line;
    int32_t results, sources;
    int32_t to[OPERANDS], from[OPERANDS];
    int64_t offset, second_offset; /* of addresses */
    Elementwise *function;
    uint8_t negated, whole, flush, space, width, is_signed, mode, transposed;
    uint8_t count, is_atomic, releases, acquires; /* of an atomic: of how many elements */
    int32_t slot;         /* of the sectors that it touches, or -1 */
    const int32_t *table; /* the registers of a wgmma: its sums, and those of A if it has some */
    int32_t members;      /* the register that has the mask of the threads that go together, or -1 */
    uint8_t rule, moved;  /* of undefined bits; and which sources are moved, as bits */
} Instruction;

/* An allocation, as in `allocation.Allocation`. */
typedef struct {
    uint64_t start, base, end;
    uint8_t *data;
    int32_t *writes, *reads, *others;
    int64_t *barriers; /* offsets of its mbarriers */
    uint8_t *touched;  /* sectors, by slots */
    int64_t sectors;
    int32_t *spare; /* becomes `others` when it is needed; or null */
    uint8_t *pages; /* whether each was accessed; or null */
    const uint8_t *written; /* by bytes: of those from the first to the last that torch.empty gave */
    uint8_t *saved;         /* the bytes of each page before its first access; or null */
    int64_t unwritten_first, unwritten_end;
    uint8_t pattern[8]; /* that these hold until they are written */
    int32_t unit, barrier_count;
    uint8_t *lane_writes, *lane_reads; /* `allocation.Allocation.lane_writes`; or null */
} Allocation;

typedef struct {
    Allocation **allocations;
    int64_t count;
    Allocation *last;
    int32_t is_deferred; /* `Space.is_deferred`: loads may be of undefined bytes */
} Space;

/* The accesses of a launch, as in `vector_clocks.Events`. */
typedef struct {
    int32_t *lines, *what, *agents, *times, *blocks;
    uint8_t *atomic;
    int64_t count, capacity;
} Events;

/* What a block has changed of global memory, to be undone: for each change where it was, how many
   bytes, and what they were. */
typedef struct {
    uint8_t *bytes;
    int64_t used, capacity;
    int64_t first_event; /* of the block: older ones are kept */
} Undo;

/* Threads that are at one place of the program, and perhaps wait there for others. */
typedef struct {
    int32_t pc;
    uint32_t mask;
    int32_t waits;
} Group;

/* The times of a block's agents, of which others have learnt. They never change; `moved` is where
   they lie now, or null. */
typedef struct Times {
    struct Times *moved;
    int64_t count;
    int32_t of[];
} Times;

typedef struct {
    int64_t block;
    Times *times;
} Past;

/* What is known of several blocks, in the order of their numbers. It never changes, either. */
typedef struct Known {
    struct Known *moved;
    int64_t count;
    Past pasts[];
} Known;

typedef struct Warp {
    const Instruction *program;
    uint8_t *rows;
    uint8_t *states;       /* of the registers */
    uint32_t *versions;    /* of the registers, counted up when they are written */
    const uint8_t *widths; /* of the registers, in bytes */
    uint8_t *undefined;    /* the shadow of each register: a row with its undefined bits */
    int32_t *causes;       /* why they are undefined */
    int64_t *counts;       /* of each instruction, `COLUMNS` numbers */
    Events *events;
    uint64_t seed;    /* of the values of registers that threads have left out */
    Space *spaces[3]; /* global, shared, local */
    int32_t *times;   /* what the warp knows of each agent of its block */
    struct Copies *copies; /* the group of cp.async that is not committed, if it has begun */
    int64_t count;    /* of the warp's instructions */
    int64_t stores;   /* to global memory */
    int32_t pc, block, index, knows_others, load_name, store_name, atomic_name;
    int32_t load_box_name, store_box_name, fence_name;
    int32_t elected; /* the thread that `elect` chooses */
    int32_t finer;   /* bytes that an element of the shadow of `coarse` must stand for */
    Allocation *coarse;
    uint32_t active;
    uint32_t *fence;       /* the versions of the registers at the last wgmma.fence, or null */
    struct Runner *runner; /* of the block, if it is executed as a whole */
    Undo *undo;            /* of the runner */
    Known *foreign;        /* what it has learnt of other blocks, or null */
    uint32_t alive;        /* the threads that have not ended */
    uint32_t first_alive;  /* those that the block has */
    int32_t of_threads;    /* whether they may diverge */
    int32_t generic;       /* the space that the instruction accesses */
    int32_t local_bytes;   /* of a thread's stack */
    int32_t swaps;  /* the kernel has a loop of atomicCAS, which begins with a plain load */
    uint32_t early; /* threads that a branch has led to their end */
    int32_t patience, held, group_count;
    Group groups[MOST_GROUPS]; /* the threads that are not active */
} Warp;

static int of_block(Warp *w, const Instruction *i, uint32_t mask);
static int wait_early(Warp *w, int32_t sum);
/* The undefined bits of an instruction's results, and why they are undefined. */
typedef struct {
    _Alignas(64) uint8_t of[OPERANDS][ROW];
    int32_t cause;
} Bits;

static int may_be_kept(Warp *w, const Instruction *i, int n);
static int find_bits(Warp *w, const Instruction *i, uint32_t mask, Bits *bits);
static void mark_results(Warp *w, const Instruction *i, uint32_t mask, const Bits *bits);
static int keep_undefined(Warp *w, int32_t n, uint32_t mask);
static void mark_undefined(Warp *w, int32_t n, const uint8_t *bits, uint32_t mask, int32_t cause);

/* Keep what is changed next. Shared memory and registers begin anew with each block. */
static void keep(const Warp *w, const Allocation *place, void *where, int64_t size)
{
    Undo *undo = w->undo;
    if (!undo || !place->touched)
        return;
    const int64_t needed = undo->used + 16 + ((size + 7) & ~7);
    if (needed > undo->capacity) {
        undo->capacity = 2 * needed + 65536;
        undo->bytes = realloc(undo->bytes, (size_t)undo->capacity);
        if (!undo->bytes)
            abort();
    }
    uint8_t *to = undo->bytes + undo->used;
    memcpy(to, &where, 8);
    memcpy(to + 8, &size, 8);
    memcpy(to + 16, where, (size_t)size);
    undo->used = needed;
}

/* Elementwise functions. Each one is named as its opcode in PTX, without ".rn" and ".ftz". */

#define MAP(NAME, TO, FROM, VALUE)                                                         \
    static void NAME(void *to, const void *from_a, const void *from_b, const void *from_c) \
    {                                                                                      \
        const FROM *a = from_a, *b = from_b, *c = from_c;                                  \
        TO *d = to;                                                                        \
        (void)a, (void)b, (void)c;                                                         \
        for (int n = 0; n < LANES; n++)                                                    \
            d[n] = VALUE;                                                                  \
    }

#define OF_INTEGERS(BITS)                                                                   \
    MAP(add_##BITS, uint##BITS##_t, uint##BITS##_t, (uint##BITS##_t)(a[n] + b[n]))          \
    MAP(sub_##BITS, uint##BITS##_t, uint##BITS##_t, (uint##BITS##_t)(a[n] - b[n]))          \
    MAP(mul_##BITS, uint##BITS##_t, uint##BITS##_t,                                         \
        (uint##BITS##_t)((uint64_t)a[n] * (uint64_t)b[n]))                                  \
    MAP(mad_##BITS, uint##BITS##_t, uint##BITS##_t,                                         \
        (uint##BITS##_t)((uint64_t)a[n] * (uint64_t)b[n] + c[n]))                           \
    MAP(and_##BITS, uint##BITS##_t, uint##BITS##_t, a[n] & b[n])                            \
    MAP(or_##BITS, uint##BITS##_t, uint##BITS##_t, a[n] | b[n])                             \
    MAP(xor_##BITS, uint##BITS##_t, uint##BITS##_t, a[n] ^ b[n])                            \
    MAP(not_##BITS, uint##BITS##_t, uint##BITS##_t, (uint##BITS##_t)~a[n])                  \
    MAP(neg_##BITS, uint##BITS##_t, uint##BITS##_t, (uint##BITS##_t)(0 - a[n]))             \
    MAP(abs_##BITS, int##BITS##_t, int##BITS##_t,                                           \
        a[n] < 0 ? (int##BITS##_t)(0 - (uint##BITS##_t)a[n]) : a[n])                        \
    MAP(max_s##BITS, int##BITS##_t, int##BITS##_t, a[n] > b[n] ? a[n] : b[n])               \
    MAP(min_s##BITS, int##BITS##_t, int##BITS##_t, a[n] < b[n] ? a[n] : b[n])               \
    MAP(max_u##BITS, uint##BITS##_t, uint##BITS##_t, a[n] > b[n] ? a[n] : b[n])             \
    MAP(min_u##BITS, uint##BITS##_t, uint##BITS##_t, a[n] < b[n] ? a[n] : b[n])             \
    /* Python leaves a / 0 at a, and a % 0 at 0. */                                         \
    MAP(div_s##BITS, int##BITS##_t, int##BITS##_t,                                          \
        b[n] == 0 ? a[n] : b[n] == -1 ? (int##BITS##_t)(0 - (uint##BITS##_t)a[n])           \
                                      : (int##BITS##_t)(a[n] / b[n]))                       \
    MAP(rem_s##BITS, int##BITS##_t, int##BITS##_t,                                          \
        b[n] == 0 || b[n] == -1 ? 0 : (int##BITS##_t)(a[n] % b[n]))                         \
    MAP(div_u##BITS, uint##BITS##_t, uint##BITS##_t, b[n] == 0 ? a[n] : (uint##BITS##_t)(a[n] / b[n])) \
    MAP(rem_u##BITS, uint##BITS##_t, uint##BITS##_t, b[n] == 0 ? 0 : (uint##BITS##_t)(a[n] % b[n])) \
    MAP(eq_##BITS, uint8_t, uint##BITS##_t, a[n] == b[n])                                   \
    MAP(ne_##BITS, uint8_t, uint##BITS##_t, a[n] != b[n])                                   \
    MAP(lt_s##BITS, uint8_t, int##BITS##_t, a[n] < b[n])                                    \
    MAP(le_s##BITS, uint8_t, int##BITS##_t, a[n] <= b[n])                                   \
    MAP(gt_s##BITS, uint8_t, int##BITS##_t, a[n] > b[n])                                    \
    MAP(ge_s##BITS, uint8_t, int##BITS##_t, a[n] >= b[n])                                   \
    MAP(lt_u##BITS, uint8_t, uint##BITS##_t, a[n] < b[n])                                   \
    MAP(le_u##BITS, uint8_t, uint##BITS##_t, a[n] <= b[n])                                  \
    MAP(gt_u##BITS, uint8_t, uint##BITS##_t, a[n] > b[n])                                   \
    MAP(ge_u##BITS, uint8_t, uint##BITS##_t, a[n] >= b[n])                                  \
    MAP(mov_##BITS, uint##BITS##_t, uint##BITS##_t, a[n])

OF_INTEGERS(16)
OF_INTEGERS(32)
OF_INTEGERS(64)
MAP(mov_8, uint8_t, uint8_t, a[n])
MAP(and_8, uint8_t, uint8_t, a[n] & b[n])
MAP(or_8, uint8_t, uint8_t, a[n] | b[n])
MAP(xor_8, uint8_t, uint8_t, a[n] ^ b[n])
MAP(not_8, uint8_t, uint8_t, !a[n])

/* Products of twice the width, or their upper half. */
MAP(wide_s16, int32_t, int16_t, (int32_t)a[n] * b[n])
MAP(wide_u16, uint32_t, uint16_t, (uint32_t)a[n] * b[n])
MAP(wide_s32, int64_t, int32_t, (int64_t)a[n] * b[n])
MAP(wide_u32, uint64_t, uint32_t, (uint64_t)a[n] * b[n])
static void mad_wide_s32(void *to, const void *from_a, const void *from_b, const void *from_c)
{
    const int32_t *a = from_a, *b = from_b;
    const uint64_t *c = from_c;
    for (int n = 0; n < LANES; n++)
        ((uint64_t *)to)[n] = (uint64_t)((int64_t)a[n] * b[n]) + c[n];
}
static void mad_wide_u32(void *to, const void *from_a, const void *from_b, const void *from_c)
{
    const uint32_t *a = from_a, *b = from_b;
    const uint64_t *c = from_c;
    for (int n = 0; n < LANES; n++)
        ((uint64_t *)to)[n] = (uint64_t)a[n] * b[n] + c[n];
}
MAP(high_s32, int32_t, int32_t, (int32_t)(((int64_t)a[n] * b[n]) >> 32))
MAP(high_u32, uint32_t, uint32_t, (uint32_t)(((uint64_t)a[n] * b[n]) >> 32))
MAP(high_s64, int64_t, int64_t, (int64_t)(((__int128)a[n] * b[n]) >> 64))
MAP(high_u64, uint64_t, uint64_t, (uint64_t)(((unsigned __int128)a[n] * b[n]) >> 64))

/* Shifts by more than the width are as by the width; the amount has 32 bits. */
#define SHIFT(NAME, TYPE, VALUE)                                                           \
    static void NAME(void *to, const void *from_a, const void *from_b, const void *from_c) \
    {                                                                                      \
        const TYPE *a = from_a;                                                            \
        const uint32_t *b = from_b;                                                        \
        TYPE *d = to;                                                                      \
        const uint32_t width = 8 * sizeof(TYPE);                                           \
        (void)from_c;                                                                      \
        for (int n = 0; n < LANES; n++)                                                    \
            d[n] = (TYPE)(VALUE);                                                          \
    }
#define SHIFTS(BITS)                                                                       \
    SHIFT(shl_##BITS, uint##BITS##_t, b[n] < width ? (uint64_t)a[n] << b[n] : 0)           \
    SHIFT(shr_u##BITS, uint##BITS##_t, b[n] < width ? a[n] >> b[n] : 0)                    \
    SHIFT(shr_s##BITS, int##BITS##_t, a[n] >> (b[n] < width ? b[n] : width - 1))
SHIFTS(16)
SHIFTS(32)
SHIFTS(64)

/* bfe: the start and the number of bits are constants. */
#define EXTRACT(NAME, TYPE, UNSIGNED)                                                      \
    static void NAME(void *to, const void *from_a, const void *from_b, const void *from_c) \
    {                                                                                      \
        const TYPE *a = from_a, *b = from_b, *c = from_c;                                  \
        TYPE *d = to;                                                                      \
        const int width = 8 * sizeof(TYPE), start = (int)b[0], count = (int)c[0];          \
        for (int n = 0; n < LANES; n++)                                                    \
            d[n] = (TYPE)((UNSIGNED)a[n] << (width - start - count)) >> (width - count);   \
    }
EXTRACT(bfe_u32, uint32_t, uint32_t)
EXTRACT(bfe_s32, int32_t, uint32_t)
EXTRACT(bfe_u64, uint64_t, uint64_t)
EXTRACT(bfe_s64, int64_t, uint64_t)

static void prmt_32(void *to, const void *from_a, const void *from_b, const void *from_c)
{
    const uint32_t *a = from_a, *b = from_b, selector = *(const uint32_t *)from_c;
    uint32_t *d = to;
    for (int n = 0; n < LANES; n++) {
        uint64_t both = (uint64_t)b[n] << 32 | a[n];
        uint32_t value = 0;
        for (int k = 0; k < 4; k++) {
            uint32_t nibble = selector >> 4 * k & 15;
            uint8_t byte = (uint8_t)(both >> 8 * (nibble & 7));
            if (nibble & 8)
                byte = (uint8_t)((int8_t)byte >> 7);
            value |= (uint32_t)byte << 8 * k;
        }
        d[n] = value;
    }
}

#define SELECT(BITS)                                                                       \
    static void selp_##BITS(void *to, const void *from_a, const void *from_b,              \
                            const void *from_c)                                            \
    {                                                                                      \
        const uint##BITS##_t *a = from_a, *b = from_b;                                     \
        const uint8_t *c = from_c;                                                         \
        uint##BITS##_t *d = to;                                                            \
        for (int n = 0; n < LANES; n++)                                                    \
            d[n] = c[n] ? a[n] : b[n];                                                     \
    }
SELECT(16)
SELECT(32)
SELECT(64)

/* Floating point. */

static inline float larger_f32(float a, float b)
{
    if (a == b && a == 0)
        return signbit(a) ? b : a;
    return isnan(a) || b > a ? b : a; /* where fmax makes NaN of a signaling one */
}
static inline float larger_or_nan_f32(float a, float b)
{
    return isnan(a) || isnan(b) ? NAN : larger_f32(a, b);
}
static inline double larger_f64(double a, double b)
{
    if (a == b && a == 0)
        return signbit(a) ? b : a;
    return isnan(a) || b > a ? b : a;
}
static inline double larger_or_nan_f64(double a, double b)
{
    return isnan(a) || isnan(b) ? (double)NAN : larger_f64(a, b);
}

/* a·b + c of halves, rounded to odd, so that it can be rounded to halves: as
   `rounding.fused_halves`. */
static inline float fused_halves(float a, float b, float c)
{
    double product = (double)a * b, total = product + c, of_c = total - product;
    double error = (product - (total - of_c)) + (c - of_c);
    uint64_t wide;
    memcpy(&wide, &total, 8);
    if (isfinite(total) && error != 0 && isfinite(error) && !(wide & 1))
        total = nextafter(total, error > 0 ? INFINITY : -INFINITY);
    float nearest = (float)total;
    uint32_t bits;
    memcpy(&bits, &nearest, 4);
    if (isfinite(nearest) && nearest != total && !(bits & 1))
        nearest = nextafterf(nearest, nearest < total ? INFINITY : -INFINITY);
    return nearest;
}

/* NaN has one form, as on GPUs: which operand's a CPU takes differs. */
static inline float fused_f32(float a, float b, float c)
{
    float result = __builtin_fmaf(a, b, c);
    return isnan(result) ? __builtin_nanf("0x3fffff") : result;
}
static inline double fused_f64(double a, double b, double c)
{
    double result = __builtin_fma(a, b, c);
    return isnan(result) ? __builtin_nan("") : result;
}

#define OF_FLOATS(BITS, TYPE, FUSED)                                                       \
    MAP(add_f##BITS, TYPE, TYPE, a[n] + b[n])                                              \
    MAP(sub_f##BITS, TYPE, TYPE, a[n] - b[n])                                              \
    MAP(mul_f##BITS, TYPE, TYPE, a[n] * b[n])                                              \
    MAP(div_f##BITS, TYPE, TYPE, a[n] / b[n])                                              \
    MAP(fma_f##BITS, TYPE, TYPE, FUSED(a[n], b[n], c[n]))                                  \
    MAP(neg_f##BITS, TYPE, TYPE, -a[n])                                                    \
    MAP(abs_f##BITS, TYPE, TYPE, a[n] < 0 || (a[n] == 0 && signbit(a[n])) ? -a[n] : a[n])  \
    MAP(max_f##BITS, TYPE, TYPE, larger_f##BITS(a[n], b[n]))                               \
    MAP(min_f##BITS, TYPE, TYPE, -larger_f##BITS(-a[n], -b[n]))                            \
    MAP(max_nan_f##BITS, TYPE, TYPE, larger_or_nan_f##BITS(a[n], b[n]))                    \
    MAP(min_nan_f##BITS, TYPE, TYPE, -larger_or_nan_f##BITS(-a[n], -b[n]))                 \
    MAP(eq_f##BITS, uint8_t, TYPE, a[n] == b[n])                                           \
    MAP(ne_f##BITS, uint8_t, TYPE, a[n] < b[n] || a[n] > b[n])                             \
    MAP(lt_f##BITS, uint8_t, TYPE, a[n] < b[n])                                            \
    MAP(le_f##BITS, uint8_t, TYPE, a[n] <= b[n])                                           \
    MAP(gt_f##BITS, uint8_t, TYPE, a[n] > b[n])                                            \
    MAP(ge_f##BITS, uint8_t, TYPE, a[n] >= b[n])                                           \
    MAP(equ_f##BITS, uint8_t, TYPE, !(a[n] < b[n] || a[n] > b[n]))                         \
    MAP(neu_f##BITS, uint8_t, TYPE, a[n] != b[n])                                          \
    MAP(ltu_f##BITS, uint8_t, TYPE, !(a[n] >= b[n]))                                       \
    MAP(leu_f##BITS, uint8_t, TYPE, !(a[n] > b[n]))                                        \
    MAP(gtu_f##BITS, uint8_t, TYPE, !(a[n] <= b[n]))                                       \
    MAP(geu_f##BITS, uint8_t, TYPE, !(a[n] < b[n]))                                        \
    MAP(nan_f##BITS, uint8_t, TYPE, isnan(a[n]) || isnan(b[n]))                            \
    MAP(num_f##BITS, uint8_t, TYPE, !(isnan(a[n]) || isnan(b[n])))
OF_FLOATS(32, float, fused_f32)
OF_FLOATS(64, double, fused_f64)
/* a·b + c rounded down, as in the exponential function of CUDA C++. The product is exact in double. */
static inline float fused_down(float a, float b, float c)
{
    double product = (double)a * b, total = product + c, of_c = total - product;
    double error = (product - (total - of_c)) + (c - of_c);
    float nearest = fused_f32(a, b, c);
    if (total == 0 && error == 0)
        return signbit(product) || signbit(c) ? -0.0f : 0.0f;
    if (nearest > total || (nearest == total && error < 0))
        return nextafterf(nearest, -INFINITY);
    return nearest;
}
MAP(fma_rm_f32, float, float, fused_down(a[n], b[n], c[n]))
MAP(sat_f32, float, float, a[n] > 0 ? (a[n] < 1 ? a[n] : 1) : 0)
MAP(sqrt_f32, float, float, __builtin_sqrtf(a[n]))
MAP(sqrt_f64, double, double, __builtin_sqrt(a[n]))
MAP(rcp_f32, float, float, 1 / a[n])
MAP(rcp_f64, double, double, 1 / a[n])

/* Approximate functions, with the deviation of `arithmetic.approximate`. */
static inline float deviate(double exact, float x, double bound)
{
    uint32_t bits;
    int exponent;
    memcpy(&bits, &x, 4);
    double deviation = (double)((bits * 2654435761u) >> 8) / 8388608.0 - 1;
    double error = frexp(exact, &exponent) == 0.5
                       ? 0
                       : 0.9 * (bound - 5.9604644775390625e-08) * deviation;
    return (float)(exact * (1 + error));
}
MAP(ex2_approx, float, float, deviate(exp2((double)a[n]), a[n], 0x1p-22))
MAP(sqrt_approx, float, float, deviate(sqrt((double)a[n]), a[n], 0x1p-23))
MAP(div_approx, float, float, deviate((double)a[n] / (double)b[n], a[n], 0x1p-22))
MAP(rcp_approx, float, float, deviate(1 / (double)a[n], a[n], 0x1p-23))
MAP(rsqrt_approx, float, float, deviate(1 / sqrt((double)a[n]), a[n], 0x1.8406003b2ae5bp-23))
MAP(tanh_approx, float, float, deviate(tanh((double)a[n]), a[n], 0x1p-11))
MAP(lg2_approx, float, float, (float)log2((double)a[n]))
MAP(sin_approx, float, float, (float)sin((double)a[n]))
MAP(cos_approx, float, float, (float)cos((double)a[n]))

/* Conversions. */

static inline uint16_t to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (isnan(x))
        return 0x7FFF;
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
static inline float of_bf16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline uint16_t to_f16(float x)
{
    _Float16 half = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return isnan(x) ? 0x7FFF : bits;
}
static inline float of_f16(uint16_t x)
{
    _Float16 half;
    memcpy(&half, &x, 2);
    return (float)half;
}
/* The bits of float32, where NaN has all but the sign, as a GPU's. */
static inline uint32_t bits_of_f16(uint16_t x)
{
    const float value = of_f16(x);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return isnan(value) ? 0x7FFFFFFF : bits;
}
#define TRUNCATE(NAME, TO, FROM, LEAST, MOST)                                              \
    MAP(NAME, TO, FROM,                                                                    \
        isnan(a[n])                 ? 0                                                    \
        : (long double)a[n] <= LEAST ? LEAST                                               \
        : (long double)a[n] >= MOST  ? MOST                                                \
                                     : (TO)a[n])
TRUNCATE(s32_f32, int32_t, float, INT32_MIN, INT32_MAX)
TRUNCATE(u32_f32, uint32_t, float, 0, UINT32_MAX)
TRUNCATE(s64_f32, int64_t, float, INT64_MIN, INT64_MAX)
TRUNCATE(s32_f64, int32_t, double, INT32_MIN, INT32_MAX)
TRUNCATE(s64_f64, int64_t, double, INT64_MIN, INT64_MAX)
#define WHOLE(BITS, TYPE)                                                                  \
    MAP(floor_f##BITS, TYPE, TYPE, __builtin_floor(a[n]))                                  \
    MAP(ceil_f##BITS, TYPE, TYPE, __builtin_ceil(a[n]))                                    \
    MAP(trunc_f##BITS, TYPE, TYPE, __builtin_trunc(a[n]))                                  \
    MAP(rint_f##BITS, TYPE, TYPE, __builtin_rint(a[n]))
WHOLE(32, float)
WHOLE(64, double)
MAP(f32_s32, float, int32_t, (float)a[n])
MAP(f32_u32, float, uint32_t, (float)a[n])
MAP(f32_s64, float, int64_t, (float)a[n])
MAP(f32_u64, float, uint64_t, (float)a[n])
MAP(f32_s16, float, int16_t, (float)a[n])
MAP(f32_u16, float, uint16_t, (float)a[n])
MAP(f64_s32, double, int32_t, (double)a[n])
MAP(f64_u32, double, uint32_t, (double)a[n])
MAP(f64_s64, double, int64_t, (double)a[n])
MAP(f64_f32, double, float, (double)a[n])
MAP(f32_f64, float, double, (float)a[n])
MAP(f32_f16, uint32_t, uint16_t, bits_of_f16(a[n]))
MAP(f32_bf16, float, uint16_t, of_bf16(a[n]))
MAP(f16_f32, uint16_t, float, to_f16(a[n]))
MAP(bf16_f32, uint16_t, float, to_bf16(a[n]))
MAP(f16x2_f32, uint32_t, float, (uint32_t)to_f16(a[n]) << 16 | to_f16(b[n]))
MAP(bf16x2_f32, uint32_t, float, (uint32_t)to_bf16(a[n]) << 16 | to_bf16(b[n]))
MAP(s64_s32, int64_t, int32_t, a[n])
MAP(u64_u32, uint64_t, uint32_t, a[n])
MAP(u32_u64, uint32_t, uint64_t, (uint32_t)a[n])
MAP(s32_s16, int32_t, int16_t, a[n])
MAP(u32_u16, uint32_t, uint16_t, a[n])
MAP(u16_u32, uint16_t, uint32_t, (uint16_t)a[n])
MAP(s64_s16, int64_t, int16_t, a[n])
MAP(u64_u16, uint64_t, uint16_t, a[n])
MAP(u16_u64, uint16_t, uint64_t, (uint16_t)a[n])
MAP(s32_s8, int32_t, uint32_t, (int8_t)a[n])
MAP(s16_s8, int16_t, uint16_t, (int8_t)a[n])
MAP(u16_u8, uint16_t, uint16_t, (uint8_t)a[n])
MAP(u32_u8, uint32_t, uint32_t, (uint8_t)a[n])

/* Halves, by float32. */
#define OF_HALF(KIND)                                                                      \
    MAP(add_##KIND, uint16_t, uint16_t, to_##KIND(of_##KIND(a[n]) + of_##KIND(b[n])))      \
    MAP(sub_##KIND, uint16_t, uint16_t, to_##KIND(of_##KIND(a[n]) - of_##KIND(b[n])))      \
    MAP(mul_##KIND, uint16_t, uint16_t, to_##KIND(of_##KIND(a[n]) * of_##KIND(b[n])))      \
    MAP(fma_##KIND, uint16_t, uint16_t,                                                    \
        to_##KIND(fused_halves(of_##KIND(a[n]), of_##KIND(b[n]), of_##KIND(c[n]))))      \
    MAP(neg_##KIND, uint16_t, uint16_t, to_##KIND(-of_##KIND(a[n])))                       \
    MAP(max_##KIND, uint16_t, uint16_t,                                                    \
        to_##KIND(larger_f32(of_##KIND(a[n]), of_##KIND(b[n]))))                           \
    MAP(min_##KIND, uint16_t, uint16_t,                                                    \
        to_##KIND(-larger_f32(-of_##KIND(a[n]), -of_##KIND(b[n]))))                        \
    MAP(max_nan_##KIND, uint16_t, uint16_t,                                                \
        to_##KIND(larger_or_nan_f32(of_##KIND(a[n]), of_##KIND(b[n]))))                    \
    MAP(min_nan_##KIND, uint16_t, uint16_t,                                                \
        to_##KIND(-larger_or_nan_f32(-of_##KIND(a[n]), -of_##KIND(b[n]))))                 \
    MAP(lt_##KIND, uint8_t, uint16_t, of_##KIND(a[n]) < of_##KIND(b[n]))                   \
    MAP(gt_##KIND, uint8_t, uint16_t, of_##KIND(a[n]) > of_##KIND(b[n]))                   \
    MAP(eq_##KIND, uint8_t, uint16_t, of_##KIND(a[n]) == of_##KIND(b[n]))
OF_HALF(f16)
OF_HALF(bf16)
#define OF_PAIR(KIND, NAME)                                                                \
    static void NAME##_##KIND##x2(void *to, const void *a, const void *b, const void *c)   \
    {                                                                                      \
        uint16_t x[3][2][LANES], d[2][LANES];                                              \
        const uint32_t *from[3] = {a, b, c};                                               \
        for (int k = 0; k < 3; k++)                                                        \
            for (int n = 0; n < LANES && from[k]; n++) {                                   \
                x[k][0][n] = (uint16_t)from[k][n];                                         \
                x[k][1][n] = (uint16_t)(from[k][n] >> 16);                                 \
            }                                                                              \
        for (int half = 0; half < 2; half++)                                               \
            NAME##_##KIND(d[half], x[0][half], x[1][half], x[2][half]);                    \
        for (int n = 0; n < LANES; n++)                                                    \
            ((uint32_t *)to)[n] = (uint32_t)d[1][n] << 16 | d[0][n];                       \
    }
OF_PAIR(f16, add) OF_PAIR(f16, sub) OF_PAIR(f16, mul) OF_PAIR(f16, fma)
OF_PAIR(f16, max) OF_PAIR(f16, min) OF_PAIR(f16, neg)
OF_PAIR(bf16, add) OF_PAIR(bf16, sub) OF_PAIR(bf16, mul) OF_PAIR(bf16, fma)
OF_PAIR(bf16, max) OF_PAIR(bf16, min) OF_PAIR(bf16, neg)

/* An opcode, its function, and the bytes of a thread's value in its result and its sources. */
typedef struct {
    const char *name;
    Elementwise *function;
    uint8_t widths[4];
} Entry;

#define ROWS_OF(BITS, W)                                                                   \
    {"add.s" #BITS, add_##BITS, {W, W, W}}, {"add.u" #BITS, add_##BITS, {W, W, W}},        \
    {"sub.s" #BITS, sub_##BITS, {W, W, W}}, {"sub.u" #BITS, sub_##BITS, {W, W, W}},        \
    {"mul.lo.s" #BITS, mul_##BITS, {W, W, W}}, {"mul.lo.u" #BITS, mul_##BITS, {W, W, W}},  \
    {"mad.lo.s" #BITS, mad_##BITS, {W, W, W, W}},                                          \
    {"mad.lo.u" #BITS, mad_##BITS, {W, W, W, W}},                                          \
    {"and.b" #BITS, and_##BITS, {W, W, W}}, {"or.b" #BITS, or_##BITS, {W, W, W}},          \
    {"xor.b" #BITS, xor_##BITS, {W, W, W}}, {"not.b" #BITS, not_##BITS, {W, W}},           \
    {"neg.s" #BITS, neg_##BITS, {W, W}}, {"abs.s" #BITS, abs_##BITS, {W, W}},              \
    {"max.s" #BITS, max_s##BITS, {W, W, W}}, {"min.s" #BITS, min_s##BITS, {W, W, W}},      \
    {"max.u" #BITS, max_u##BITS, {W, W, W}}, {"min.u" #BITS, min_u##BITS, {W, W, W}},      \
    {"div.s" #BITS, div_s##BITS, {W, W, W}}, {"rem.s" #BITS, rem_s##BITS, {W, W, W}},      \
    {"div.u" #BITS, div_u##BITS, {W, W, W}}, {"rem.u" #BITS, rem_u##BITS, {W, W, W}},      \
    {"shl.b" #BITS, shl_##BITS, {W, W, 4}}, {"shr.b" #BITS, shr_u##BITS, {W, W, 4}},       \
    {"shr.u" #BITS, shr_u##BITS, {W, W, 4}}, {"shr.s" #BITS, shr_s##BITS, {W, W, 4}},      \
    {"selp.b" #BITS, selp_##BITS, {W, W, W, 1}}, {"selp.u" #BITS, selp_##BITS, {W, W, W, 1}}, \
    {"selp.s" #BITS, selp_##BITS, {W, W, W, 1}}, {"selp.f" #BITS, selp_##BITS, {W, W, W, 1}}, \
    {"mov.b" #BITS, mov_##BITS, {W, W}}, {"mov.u" #BITS, mov_##BITS, {W, W}},              \
    {"mov.s" #BITS, mov_##BITS, {W, W}}, {"mov.f" #BITS, mov_##BITS, {W, W}},              \
    {"setp.eq.s" #BITS, eq_##BITS, {1, W, W}}, {"setp.eq.u" #BITS, eq_##BITS, {1, W, W}},  \
    {"setp.eq.b" #BITS, eq_##BITS, {1, W, W}}, {"setp.ne.s" #BITS, ne_##BITS, {1, W, W}},  \
    {"setp.ne.u" #BITS, ne_##BITS, {1, W, W}}, {"setp.ne.b" #BITS, ne_##BITS, {1, W, W}},  \
    {"setp.lt.s" #BITS, lt_s##BITS, {1, W, W}}, {"setp.le.s" #BITS, le_s##BITS, {1, W, W}}, \
    {"setp.gt.s" #BITS, gt_s##BITS, {1, W, W}}, {"setp.ge.s" #BITS, ge_s##BITS, {1, W, W}}, \
    {"setp.lt.u" #BITS, lt_u##BITS, {1, W, W}}, {"setp.le.u" #BITS, le_u##BITS, {1, W, W}}, \
    {"setp.gt.u" #BITS, gt_u##BITS, {1, W, W}}, {"setp.ge.u" #BITS, ge_u##BITS, {1, W, W}}, \
    {"setp.lo.u" #BITS, lt_u##BITS, {1, W, W}}, {"setp.ls.u" #BITS, le_u##BITS, {1, W, W}}, \
    {"setp.hi.u" #BITS, gt_u##BITS, {1, W, W}}, {"setp.hs.u" #BITS, ge_u##BITS, {1, W, W}}

#define FLOATS_OF(BITS, W)                                                                 \
    {"add.f" #BITS, add_f##BITS, {W, W, W}}, {"sub.f" #BITS, sub_f##BITS, {W, W, W}},      \
    {"mul.f" #BITS, mul_f##BITS, {W, W, W}}, {"div.f" #BITS, div_f##BITS, {W, W, W}},      \
    {"fma.f" #BITS, fma_f##BITS, {W, W, W, W}}, {"neg.f" #BITS, neg_f##BITS, {W, W}},      \
    {"abs.f" #BITS, abs_f##BITS, {W, W}}, {"sqrt.f" #BITS, sqrt_f##BITS, {W, W}},          \
    {"rcp.f" #BITS, rcp_f##BITS, {W, W}}, {"max.f" #BITS, max_f##BITS, {W, W, W}},         \
    {"min.f" #BITS, min_f##BITS, {W, W, W}}, {"max.NaN.f" #BITS, max_nan_f##BITS, {W, W, W}}, \
    {"min.NaN.f" #BITS, min_nan_f##BITS, {W, W, W}},                                       \
    {"setp.eq.f" #BITS, eq_f##BITS, {1, W, W}}, {"setp.ne.f" #BITS, ne_f##BITS, {1, W, W}}, \
    {"setp.lt.f" #BITS, lt_f##BITS, {1, W, W}}, {"setp.le.f" #BITS, le_f##BITS, {1, W, W}}, \
    {"setp.gt.f" #BITS, gt_f##BITS, {1, W, W}}, {"setp.ge.f" #BITS, ge_f##BITS, {1, W, W}}, \
    {"setp.equ.f" #BITS, equ_f##BITS, {1, W, W}}, {"setp.neu.f" #BITS, neu_f##BITS, {1, W, W}}, \
    {"setp.ltu.f" #BITS, ltu_f##BITS, {1, W, W}}, {"setp.leu.f" #BITS, leu_f##BITS, {1, W, W}}, \
    {"setp.gtu.f" #BITS, gtu_f##BITS, {1, W, W}}, {"setp.geu.f" #BITS, geu_f##BITS, {1, W, W}}, \
    {"setp.nan.f" #BITS, nan_f##BITS, {1, W, W}}, {"setp.num.f" #BITS, num_f##BITS, {1, W, W}}

#define HALVES_OF(KIND)                                                                    \
    {"add." #KIND, add_##KIND, {2, 2, 2}}, {"sub." #KIND, sub_##KIND, {2, 2, 2}},          \
    {"mul." #KIND, mul_##KIND, {2, 2, 2}}, {"fma." #KIND, fma_##KIND, {2, 2, 2, 2}},       \
    {"max." #KIND, max_##KIND, {2, 2, 2}}, {"min." #KIND, min_##KIND, {2, 2, 2}},          \
    {"max.NaN." #KIND, max_nan_##KIND, {2, 2, 2}},                                         \
    {"min.NaN." #KIND, min_nan_##KIND, {2, 2, 2}}, {"neg." #KIND, neg_##KIND, {2, 2}},     \
    {"setp.lt." #KIND, lt_##KIND, {1, 2, 2}}, {"setp.gt." #KIND, gt_##KIND, {1, 2, 2}},    \
    {"setp.eq." #KIND, eq_##KIND, {1, 2, 2}},                                              \
    {"add." #KIND "x2", add_##KIND##x2, {4, 4, 4}},                                        \
    {"sub." #KIND "x2", sub_##KIND##x2, {4, 4, 4}},                                        \
    {"mul." #KIND "x2", mul_##KIND##x2, {4, 4, 4}},                                        \
    {"fma." #KIND "x2", fma_##KIND##x2, {4, 4, 4, 4}},                                     \
    {"max." #KIND "x2", max_##KIND##x2, {4, 4, 4}},                                        \
    {"min." #KIND "x2", min_##KIND##x2, {4, 4, 4}},                                        \
    {"neg." #KIND "x2", neg_##KIND##x2, {4, 4}},                                           \
    {"cvt.f32." #KIND, f32_##KIND, {4, 2}}, {"cvt.rn." #KIND ".f32", KIND##_f32, {2, 4}},  \
    {"cvt.rn." #KIND "x2.f32", KIND##x2_f32, {4, 4, 4}}

static const Entry ENTRIES[] = {
    ROWS_OF(16, 2), ROWS_OF(32, 4), ROWS_OF(64, 8), FLOATS_OF(32, 4), FLOATS_OF(64, 8),
    HALVES_OF(f16), HALVES_OF(bf16),
    {"mov.pred", mov_8, {1, 1}}, {"and.pred", and_8, {1, 1, 1}}, {"or.pred", or_8, {1, 1, 1}},
    {"xor.pred", xor_8, {1, 1, 1}}, {"not.pred", not_8, {1, 1}},
    {"cvta.param.u64", mov_64, {8, 8}}, {"cvta.to.global.u64", mov_64, {8, 8}}, {"cvta.global.u64", mov_64, {8, 8}},
    {"mul.wide.s16", wide_s16, {4, 2, 2}}, {"mul.wide.u16", wide_u16, {4, 2, 2}},
    {"mul.wide.s32", wide_s32, {8, 4, 4}}, {"mul.wide.u32", wide_u32, {8, 4, 4}},
    {"mad.wide.s32", mad_wide_s32, {8, 4, 4, 8}}, {"mad.wide.u32", mad_wide_u32, {8, 4, 4, 8}},
    {"mul.hi.s32", high_s32, {4, 4, 4}}, {"mul.hi.u32", high_u32, {4, 4, 4}},
    {"mul.hi.s64", high_s64, {8, 8, 8}}, {"mul.hi.u64", high_u64, {8, 8, 8}},
    {"bfe.u32", bfe_u32, {4, 4, 4, 4}}, {"bfe.s32", bfe_s32, {4, 4, 4, 4}},
    {"bfe.u64", bfe_u64, {8, 8, 8, 8}}, {"bfe.s64", bfe_s64, {8, 8, 8, 8}},
    {"prmt.b32", prmt_32, {4, 4, 4, 4}},
    {"ex2.approx.f32", ex2_approx, {4, 4}}, {"sqrt.approx.f32", sqrt_approx, {4, 4}},
    {"div.full.f32", div_approx, {4, 4, 4}}, {"div.approx.f32", div_approx, {4, 4, 4}},
    {"rcp.approx.f32", rcp_approx, {4, 4}}, {"rsqrt.approx.f32", rsqrt_approx, {4, 4}},
    {"tanh.approx.f32", tanh_approx, {4, 4}}, {"lg2.approx.f32", lg2_approx, {4, 4}},
    {"sin.approx.f32", sin_approx, {4, 4}}, {"cos.approx.f32", cos_approx, {4, 4}},
    {"cvt.rzi.s32.f32", s32_f32, {4, 4}}, {"cvt.rzi.u32.f32", u32_f32, {4, 4}},
    {"cvt.rzi.s64.f32", s64_f32, {8, 4}}, {"cvt.rzi.s32.f64", s32_f64, {4, 8}},
    {"cvt.rzi.s64.f64", s64_f64, {8, 8}},
    {"cvt.rmi.f32.f32", floor_f32, {4, 4}}, {"cvt.rmi.f64.f64", floor_f64, {8, 8}},
    {"cvt.rpi.f32.f32", ceil_f32, {4, 4}}, {"cvt.rpi.f64.f64", ceil_f64, {8, 8}},
    {"cvt.rzi.f32.f32", trunc_f32, {4, 4}}, {"cvt.rzi.f64.f64", trunc_f64, {8, 8}},
    {"cvt.rni.f32.f32", rint_f32, {4, 4}}, {"cvt.rni.f64.f64", rint_f64, {8, 8}},
    {"cvt.rn.f32.s32", f32_s32, {4, 4}}, {"cvt.rn.f32.u32", f32_u32, {4, 4}},
    {"cvt.rn.f32.s64", f32_s64, {4, 8}}, {"cvt.rn.f32.u64", f32_u64, {4, 8}},
    {"cvt.rn.f32.s16", f32_s16, {4, 2}}, {"cvt.rn.f32.u16", f32_u16, {4, 2}},
    {"cvt.rn.f64.s32", f64_s32, {8, 4}}, {"cvt.rn.f64.u32", f64_u32, {8, 4}},
    {"cvt.rn.f64.s64", f64_s64, {8, 8}}, {"cvt.f64.f32", f64_f32, {8, 4}},
    {"cvt.rn.f32.f64", f32_f64, {4, 8}}, {"cvt.sat.f32.f32", sat_f32, {4, 4}},
    {"fma.rm.f32", fma_rm_f32, {4, 4, 4, 4}},
    {"cvt.s64.s32", s64_s32, {8, 4}}, {"cvt.u64.u32", u64_u32, {8, 4}},
    {"cvt.u32.u64", u32_u64, {4, 8}}, {"cvt.s32.s16", s32_s16, {4, 2}},
    {"cvt.u32.u16", u32_u16, {4, 2}}, {"cvt.u16.u32", u16_u32, {2, 4}},
    {"cvt.s64.s16", s64_s16, {8, 2}}, {"cvt.u64.u16", u64_u16, {8, 2}},
    {"cvt.u16.u64", u16_u64, {2, 8}}, {"cvt.s32.s8", s32_s8, {4, 4}},
    {"cvt.s16.s8", s16_s8, {2, 2}}, {"cvt.u16.u8", u16_u8, {2, 2}},
    {"cvt.u32.u8", u32_u8, {4, 4}},
};

/* Return the number of an opcode's entry, or -1. */
int entry_of(const char *name, uint8_t widths[4])
{
    for (unsigned n = 0; n < sizeof ENTRIES / sizeof *ENTRIES; n++)
        if (strcmp(ENTRIES[n].name, name) == 0) {
            memcpy(widths, ENTRIES[n].widths, 4);
            return (int)n;
        }
    return -1;
}

void *function_of(int entry) { return (void *)ENTRIES[entry].function; }

/* Registers. */

static inline uint8_t *row(const Warp *w, int32_t n) { return w->rows + (int64_t)ROW * n; }

static inline int in_row(const Warp *w, int32_t n) { return w->states[n] & IN_ROW; }

static inline uint32_t bits_of(const uint8_t *booleans)
{
    uint32_t mask = 0;
    for (int n = 0; n < 4; n++) {
        uint64_t eight;
        memcpy(&eight, booleans + 8 * n, 8);
        mask |= (uint32_t)((eight * 0x0102040810204080u) >> 56) << 8 * n;
    }
    return mask;
}

/* Put values into a register, in the threads of the mask. */
static void put(Warp *w, int32_t n, const void *values, uint32_t mask)
{
    const int width = w->widths[n];
    uint8_t *to = row(w, n);
    if (mask == ALL)
        memcpy(to, values, (size_t)(LANES * width));
    else
        for (int k = 0; k < LANES; k++)
            if (mask >> k & 1)
                memcpy(to + k * width, (const uint8_t *)values + k * width, (size_t)width);
    const int is_kept = mask != ALL && w->states[n] & UNDEFINED && keep_undefined(w, n, mask);
    w->states[n] = is_kept ? UNDEFINED : IN_ROW;
    w->versions[n]++;
}

static void flush(void *to, const void *from)
{
    const float *a = from;
    float *d = to;
    for (int n = 0; n < LANES; n++)
        d[n] = fabsf(a[n]) < 0x1p-126f ? copysignf(0, a[n]) : a[n];
}

static void elementwise(Warp *w, const Instruction *i, uint32_t mask)
{
    _Alignas(64) uint8_t result[ROW], copies[3][ROW];
    const void *from[3] = {0, 0, 0};
    for (int n = 0; n < i->sources; n++) {
        from[n] = row(w, i->from[n]);
        if (i->flush) {
            flush(copies[n], from[n]);
            from[n] = copies[n];
        }
    }
    const int is_held =
        i->mode && w->fence && w->fence[i->from[0]] == w->versions[i->from[0]];
    i->function(result, from[0], from[1], from[2]);
    if (i->flush && w->widths[i->to[0]] == 4)
        flush(result, result);
    put(w, i->to[0], result, mask);
    /* A copy of a register that was there at the last wgmma.fence counts as such. */
    if (is_held)
        w->fence[i->to[0]] = w->versions[i->to[0]];
}

/* Vectors are packed into one register, or taken from it: `mov.b64 %rd, {%r1, %r2}`. */
static void pack_rows(const Warp *w, const Instruction *i, const uint8_t *const *from,
                      uint8_t (*values)[ROW])
{
    uint8_t whole[LANES][16];
    int width = 0;
    for (int n = 0; n < i->sources; n++) {
        int one = w->widths[i->from[n]];
        for (int k = 0; k < LANES; k++)
            memcpy(whole[k] + width, from[n] + k * one, (size_t)one);
        width += one;
    }
    width = 0;
    for (int n = 0; n < i->results; n++) {
        int one = i->to[n] < 0 ? i->width : w->widths[i->to[n]];
        for (int k = 0; k < LANES; k++)
            memcpy(values[n] + k * one, whole[k] + width, (size_t)one);
        width += one;
    }
}

static void pack(Warp *w, const Instruction *i, uint32_t mask)
{
    _Alignas(64) uint8_t values[OPERANDS][ROW];
    const uint8_t *from[OPERANDS];
    for (int n = 0; n < i->sources; n++)
        from[n] = row(w, i->from[n]);
    pack_rows(w, i, from, values);
    for (int n = 0; n < i->results; n++)
        if (i->to[n] >= 0)
            put(w, i->to[n], values[n], mask);
}

/* What each thread takes of another's value. Return 0 if that one is not here. */
static inline int shuffle_values(const Warp *w, const Instruction *i, uint32_t mask,
                                 const uint32_t *value, uint32_t *result, uint8_t *valid)
{
    const uint32_t *lane = (void *)row(w, i->from[1]), *limit = (void *)row(w, i->from[2]);
    for (int n = 0; n < LANES; n++) {
        int bits = lane[n] & 31, last = limit[n] & 31, segment = limit[n] >> 8 & 31;
        int least = n & segment, most = (n & segment) | (last & ~segment), taken;
        switch (i->mode) {
        case 0: taken = n - bits; break;
        case 1: taken = n + bits; break;
        case 2: taken = n ^ bits; break;
        default: taken = least | (bits & ~segment);
        }
        valid[n] = i->mode == 0 ? taken >= most : taken <= most;
        if (valid[n] && mask >> n & 1 && !(mask >> taken & 1))
            return 0;
        result[n] = value[valid[n] ? taken : n];
    }
    return 1;
}

static int shuffle(Warp *w, const Instruction *i, uint32_t mask)
{
    uint32_t result[LANES];
    uint8_t valid[LANES];
    if (!shuffle_values(w, i, mask, (void *)row(w, i->from[0]), result, valid))
        return PYTHON;
    put(w, i->to[0], result, mask);
    if (i->results > 1)
        put(w, i->to[1], valid, mask);
    return BUDGET;
}

/* Memory. */

/* The times of a block, or null. */
static const Times *past_of(const Known *known, int64_t block)
{
    int64_t first = 0, end = known->count;
    while (first < end) {
        const int64_t middle = (first + end) / 2;
        if (known->pasts[middle].block < block)
            first = middle + 1;
        else
            end = middle;
    }
    return first < known->count && known->pasts[first].block == block ? known->pasts[first].times
                                                                      : 0;
}

/* Whether the warp knows an event; -1 if Python must say so. */
static inline int knows(const Warp *w, int32_t event)
{
    const Events *events = w->events;
    if (event == GIVEN)
        return 1;
    if (events->blocks[event] == w->block)
        return events->times[event] <= w->times[events->agents[event]];
    if (w->foreign) {
        const Times *past = past_of(w->foreign, events->blocks[event]);
        const int32_t agent = events->agents[event];
        return past && agent < past->count && events->times[event] <= past->of[agent];
    }
    return w->knows_others ? -1 : 0;
}

static Allocation *find(Space *space, uint64_t address)
{
    Allocation *last = space->last;
    if (last && last->start <= address && address < last->end)
        return last;
    for (int64_t n = 0; n < space->count; n++) {
        Allocation *one = space->allocations[n];
        if (one->start <= address && address < one->end)
            return space->last = one;
    }
    return 0;
}

/* Where the threads of the mask access memory: offsets in an allocation. */
typedef struct {
    Allocation *place;
    int64_t offsets[LANES];
    int lanes[LANES], count;
    int64_t least, most;
} Access;

static int locate_at(Warp *w, int32_t base, int64_t added, Space *space, uint32_t mask, int width,
                     int limit, Access *at)
{
    const uint8_t *held = row(w, base);
    const int is_short = w->widths[base] == 4;
    at->count = 0;
    at->place = 0;
    at->least = INT64_MAX;
    at->most = -1;
    for (int n = 0; n < limit; n++) {
        if (!(mask >> n & 1))
            continue;
        uint64_t address = (uint64_t)added;
        address += is_short ? ((const uint32_t *)held)[n] : ((const uint64_t *)held)[n];
        if (!at->place && !(at->place = find(space, address)))
            return 0;
        const Allocation *place = at->place;
        if (address < place->start || address + (uint64_t)width > place->end)
            return 0;
        int64_t offset = (int64_t)(address - place->base);
        if (offset & (width - 1))
            return 0;
        at->offsets[at->count] = offset;
        at->lanes[at->count++] = n;
        at->least = offset < at->least ? offset : at->least;
        at->most = offset > at->most ? offset : at->most;
    }
    if (at->place && at->place->unit > width) {
        w->coarse = at->place;
        w->finer = width;
        return 0;
    }
    return at->place != 0;
}

static inline int space_of(const Warp *w, const Instruction *i)
{
    return i->space == GENERIC ? w->generic : i->space;
}

static int locate(Warp *w, const Instruction *i, uint32_t mask, int width, int limit, Access *at)
{
    const int space = space_of(w, i);
    if (!locate_at(w, i->from[0], i->offset, w->spaces[space], mask, width, limit, at))
        return 0;
    for (int n = 0; space == 2 && w->local_bytes && n < at->count; n++) {
        const int64_t own = (int64_t)(w->index * LANES + at->lanes[n]) * w->local_bytes;
        if (at->offsets[n] < own || at->offsets[n] + width > own + w->local_bytes)
            return 0; /* the stack of another thread */
    }
    return 1;
}

static int32_t add_event(Warp *w, int32_t line, int32_t what, int32_t agent, int32_t time)
{
    Events *events = w->events;
    int32_t number = (int32_t)events->count++;
    events->lines[number] = line;
    events->what[number] = what;
    events->agents[number] = agent;
    events->times[number] = time;
    events->blocks[number] = w->block;
    events->atomic[number] = 0;
    return number;
}

static int32_t load_event(Warp *w, const Instruction *i)
{
    return add_event(w, i->line, w->load_name, w->index, w->times[w->index]);
}

/* Behind the last of the accesses from the n-th on that lie side by side. */
static inline int64_t end_of_run(const int64_t *offsets, int64_t n, int64_t count, int width)
{
    while (n + 1 < count && offsets[n + 1] == offsets[n] + width)
        n++;
    return n + 1;
}

/* `allocation.Allocation.begin`. */
static __attribute__((noinline)) void begin_page(const Allocation *place, int64_t page)
{
    const int64_t start = page * PAGE, size = (int64_t)(place->end - place->base) - start;
    place->pages[page] = 1;
    if (place->saved)
        memcpy(place->saved + start, place->data + start, (size_t)(size < PAGE ? size : PAGE));
    const int64_t lowest = place->unwritten_first, highest = place->unwritten_end;
    const int64_t first = start > lowest ? start : lowest;
    const int64_t end = start + PAGE < highest ? start + PAGE : highest;
    for (int64_t k = first; k < end; k++)
        if (!place->written[k] && place->data[k] != place->pattern[(k - lowest) & 7])
            return; /* the host has written the page by other means than PyTorch's operators */
    for (int64_t k = first / place->unit; k * place->unit < end; k++)
        if (!place->written[k * place->unit])
            place->writes[k] = UNWRITTEN;
}

/* Begin all pages, because the first access to one may be by several cores of the CPU. */
void begin_pages(const Allocation *place)
{
    for (int64_t page = 0; place->pages && page * PAGE < (int64_t)(place->end - place->base); page++)
        if (!place->pages[page])
            begin_page(place, page);
}

/* Begin the pages of units that are accessed the first time. */
static inline void begin(const Allocation *place, int64_t first, int64_t end)
{
    if (!place->pages)
        return;
    const int64_t last = (end * place->unit - 1) / PAGE;
    for (int64_t page = first * place->unit / PAGE; page <= last; page++)
        if (!place->pages[page])
            begin_page(place, page);
}

static inline int all_given(const int32_t *events, int64_t first, int64_t end)
{
    int32_t any = GIVEN;
    for (int64_t k = first; k < end; k++)
        any |= events[k];
    return any == GIVEN;
}

/* Whether the warp knows who has written the units from the first one up to the end. `fenced` are
   the times of what it knew at its last fence between the proxies, or null. */
static int knows_writers(const Warp *w, const Allocation *place, int64_t first, int64_t end,
                         const int32_t *fenced)
{
    const Events *events = w->events;
    begin(place, first, end);
    for (int64_t k = first; k < end; k++) {
        const int32_t writer = place->writes[k];
        if (writer == GIVEN)
            continue;
        if (knows(w, writer) != 1 && !(w->swaps && events->atomic[writer]))
            return 0;
        if (fenced && events->blocks[writer] == w->block &&
            events->times[writer] > fenced[events->agents[writer]])
            return 0;
    }
    return 1;
}

/* `memory.Space._read` without a fault, in two halves: whether it has none, and what it changes. */
static int may_note_read(const Warp *w, Allocation *place, int64_t first, int64_t end)
{
    if (all_given(place->reads, first, end))
        return 1;
    for (int64_t k = first; k < end; k++) {
        const int known = knows(w, place->reads[k]);
        if (known == 1)
            continue;
        if (known == 0 && !place->others)
            place->others = place->spare;
        if (known < 0 || !place->others || knows(w, place->others[k]) < 0)
            return 0;
    }
    return 1;
}

static int may_read_units(const Warp *w, Allocation *place, int64_t first, int64_t end,
                          const int32_t *fenced)
{
    begin(place, first, end);
    if (!all_given(place->writes, first, end) && !knows_writers(w, place, first, end, fenced))
        return 0;
    return may_note_read(w, place, first, end);
}

static int may_read(const Warp *w, Allocation *place, const int64_t *offsets, int64_t count,
                    int width, const int32_t *fenced)
{
    for (int64_t n = 0; n < count;) {
        const int64_t first = offsets[n] / place->unit;
        n = end_of_run(offsets, n, count, width);
        const int64_t end = (offsets[n - 1] + width) / place->unit;
        if (!may_read_units(w, place, first, end, fenced))
            return 0;
    }
    return 1;
}

static void note_read_units(const Warp *w, const Allocation *place, int64_t first, int64_t end,
                            int32_t event)
{
    if (place->others && !all_given(place->reads, first, end)) {
        keep(w, place, place->others + first, 4 * (end - first));
        for (int64_t k = first; k < end; k++)
            if (!knows(w, place->reads[k]) && knows(w, place->others[k]))
                place->others[k] = place->reads[k];
    }
    int is_kept = w->undo != 0; /* what this block has read before */
    for (int64_t k = first; k < end && is_kept; k++)
        is_kept = place->reads[k] >= w->undo->first_event;
    if (!is_kept)
        keep(w, place, place->reads + first, 4 * (end - first));
    for (int64_t k = first; k < end; k++)
        place->reads[k] = event;
}

static void note_read(const Warp *w, const Allocation *place, const int64_t *offsets,
                      int64_t count, int width, int32_t event)
{
    for (int64_t n = 0; n < count;) {
        const int64_t first = offsets[n] / place->unit;
        n = end_of_run(offsets, n, count, width);
        note_read_units(w, place, first, (offsets[n - 1] + width) / place->unit, event);
    }
}

/* `memory.Space._write` without a fault, in two halves, too. */
static int hits_barrier(const Allocation *place, int64_t first, int64_t end)
{
    for (int n = 0; n < place->barrier_count; n++)
        if (first <= place->barriers[n] + 7 && place->barriers[n] < end)
            return 1;
    return 0;
}

static int may_write_units(const Warp *w, const Allocation *place, int64_t first, int64_t end)
{
    begin(place, first, end);
    if (all_given(place->writes, first, end) && all_given(place->reads, first, end) &&
        (!place->others || all_given(place->others, first, end)))
        return 1;
    for (int64_t k = first; k < end; k++) {
        const int32_t writer = place->writes[k];
        if (writer != UNWRITTEN && knows(w, writer) != 1)
            return 0;
        if (knows(w, place->reads[k]) != 1)
            return 0;
        if (place->others && knows(w, place->others[k]) != 1)
            return 0;
    }
    return 1;
}

static int may_write(const Warp *w, const Access *at, int width)
{
    const Allocation *place = at->place;
    if (hits_barrier(place, at->least, at->most + width))
        return 0;
    for (int64_t n = 0; n < at->count;) {
        const int64_t first = at->offsets[n] / place->unit;
        n = end_of_run(at->offsets, n, at->count, width);
        if (!may_write_units(w, place, first, (at->offsets[n - 1] + width) / place->unit))
            return 0;
    }
    return 1;
}

/* `memory.Space._same`: warps may store the same values unordered, since Triton's layouts have copies
   in several warps. */
static __attribute__((noinline)) int may_write_again(const Warp *w, const Access *at,
                                                     uint8_t (*values)[MOST_STORED], int width)
{
    const Allocation *place = at->place;
    const int unit = place->unit;
    if (hits_barrier(place, at->least, at->most + width))
        return 0;
    for (int n = 0; n < at->count; n++)
        for (int k = 0; k < width; k += unit) {
            const int64_t at_byte = at->offsets[n] + k, number = at_byte / unit;
            const int32_t writer = place->writes[number];
            const int is_known = writer == UNWRITTEN ? 1 : knows(w, writer);
            if (knows(w, place->reads[number]) != 1 ||
                (place->others && knows(w, place->others[number]) != 1))
                return 0;
            if (is_known < 0 || (!is_known && (w->events->blocks[writer] != w->block ||
                                               memcmp(place->data + at_byte, values[n] + k,
                                                      (size_t)unit))))
                return 0;
        }
    return 1;
}

static void note_write_units(const Warp *w, const Allocation *place, int64_t first, int64_t end,
                             int32_t event)
{
    const int64_t bytes = 4 * (end - first);
    keep(w, place, place->writes + first, bytes);
    keep(w, place, place->reads + first, bytes);
    for (int64_t k = first; k < end; k++)
        place->writes[k] = event;
    memset(place->reads + first, 0, (size_t)bytes);
    if (place->others) {
        keep(w, place, place->others + first, bytes);
        memset(place->others + first, 0, (size_t)bytes);
    }
}

static void note_write(const Warp *w, const Access *at, int width, int32_t event)
{
    const Allocation *place = at->place;
    for (int64_t n = 0; n < at->count;) {
        const int64_t first = at->offsets[n] / place->unit;
        n = end_of_run(at->offsets, n, at->count, width);
        note_write_units(w, place, first, (at->offsets[n - 1] + width) / place->unit, event);
    }
}

/* `memory.Space._note_lanes`: whether other threads of the warp have accessed what these threads
   access, since the last barrier of the warp; and note who accesses it. */
static inline int is_recent(const Warp *w, int32_t event)
{
    const Events *events = w->events;
    return event > UNWRITTEN && events->blocks[event] == w->block &&
           events->agents[event] == w->index && events->times[event] == w->times[w->index] &&
           !events->atomic[event];
}

static int note_lanes(const Warp *w, const Access *at, int width, int is_write)
{
    const Allocation *place = at->place;
    const int units = width / place->unit;
    if (!place->lane_writes)
        return 1;
    for (int n = 0; n < at->count; n++)
        for (int64_t k = at->offsets[n] / place->unit, m = 0; m < units; m++, k++) {
            const int lane = at->lanes[n];
            if (place->lane_writes[k] != lane && is_recent(w, place->writes[k]))
                return 0;
            if (is_write && place->lane_reads[k] != lane && is_recent(w, place->reads[k]))
                return 0;
        }
    for (int n = 0; n < at->count; n++)
        for (int64_t k = at->offsets[n] / place->unit, m = 0; m < units; m++, k++) {
            const uint8_t lane = (uint8_t)at->lanes[n];
            if (is_write)
                place->lane_writes[k] = lane;
            else if (place->lane_reads[k] != lane &&
                     is_recent(w, place->reads[k]))
                place->lane_reads[k] = MANY;
            else
                place->lane_reads[k] = lane;
        }
    if (!is_write && at->least != at->most) /* several of these threads read one element */
        for (int n = 1; n < at->count; n++)
            for (int k = 0; k < n; k++)
                if (at->offsets[n] == at->offsets[k]) {
                    place->lane_reads[at->offsets[n] / place->unit] = MANY;
                    break;
                }
    if (!is_write && at->least == at->most && at->count > 1)
        place->lane_reads[at->least / place->unit] = MANY;
    return 1;
}

/* memcpy with a size that the compiler knows. */
static inline void copy_value(uint8_t *values, int lane, const uint8_t *from, int width)
{
    switch (width) {
    case 2: memcpy(values + 2 * lane, from, 2); break;
    case 4: memcpy(values + 4 * lane, from, 4); break;
    default: memcpy(values + 8 * lane, from, 8);
    }
}

/* What `instruction_counts` has of an access. */

static inline int64_t *counts_of(const Warp *w, const Instruction *i)
{
    return w->counts + COLUMNS * (i - w->program);
}

/* How many different numbers there are, at most 64. */
static int distinct(const int64_t *numbers, int count)
{
    int found = count > 0;
    for (int n = 1; n < count; n++) {
        if (numbers[n] == numbers[n - 1])
            continue;
        if (numbers[n] < numbers[n - 1])
            goto unordered;
        found++;
    }
    return found;
unordered:
    found = 0;
    for (int n = 0; n < count; n++) {
        int k = 0;
        while (k < n && numbers[k] != numbers[n])
            k++;
        found += k == n;
    }
    return found;
}

/* Where it is noted which sectors of an allocation an instruction touches; or null. */
static inline uint8_t *touched_by(const Instruction *i, const Allocation *place)
{
    return place->touched && i->slot >= 0 ? place->touched + i->slot * place->sectors : 0;
}

static void count_global(const Warp *w, const Instruction *i, const Access *at, int width)
{
    int64_t *row = counts_of(w, i), sectors[LANES];
    uint8_t *touched = touched_by(i, at->place);
    for (int n = 0; n < at->count; n++) {
        sectors[n] = at->offsets[n] / 32;
        if (touched)
            touched[sectors[n]] = 1;
    }
    row[REQUESTS]++;
    row[BYTES] += (int64_t)at->count * width;
    row[SECTORS] += (int64_t)distinct(sectors, at->count) * ((width + 31) / 32);
    row[LEAST_SECTORS] += ((int64_t)distinct(at->offsets, at->count) * width + 31) / 32;
}

/* `instruction_counts.wavefronts`: threads go together that access 128 bytes, and a group that reads
   only words of the last group that was served takes no turn. */
static void count_shared(const Warp *w, const Instruction *i, const Access *at, int width)
{
    int64_t *row = counts_of(w, i), both[2][LANES], *words = both[0], *before = both[1];
    const int each = width > 4 ? width / 4 : 1, together = LANES / each;
    int count_before = 0;
    for (int n = 0; n < at->count;) {
        const int group = at->lanes[n] / together;
        int count = 0, is_new = i->kind == STORE, ordered = 1;
        for (; n < at->count && at->lanes[n] / together == group; n++)
            for (int k = 0; k < each; k++) {
                words[count] = at->offsets[n] / 4 + k;
                ordered &= !count || words[count] == words[count - 1] + 1;
                count++;
            }
        for (int k = 0; k < count && !is_new; k++) {
            int m = 0;
            while (m < count_before && before[m] != words[k])
                m++;
            is_new = m == count_before;
        }
        if (!is_new)
            continue;
        int held[LANES] = {0}, most = 1, total = count;
        for (int k = 0; k < count && !ordered; k++) {
            int m = 0;
            while (words[m] != words[k])
                m++;
            if (m < k) {
                total--;
                continue;
            }
            const int turns = ++held[words[k] % LANES];
            most = turns > most ? turns : most;
        }
        row[WAVEFRONTS] += most;
        row[LEAST_WAVEFRONTS] += (total + LANES - 1) / LANES;
        count_before = count;
        int64_t *other = words;
        words = before;
        before = other;
    }
    row[SHARED_REQUESTS]++;
    row[SHARED_BYTES] += (int64_t)at->count * width;
}

static void count_access(const Warp *w, const Instruction *i, const Access *at, int width)
{
    const int space = space_of(w, i);
    if (space == 0)
        count_global(w, i, at, width);
    else if (space == 1)
        count_shared(w, i, at, width);
}

/* The bytes of a load that have no defined value, since the warp does not know who has written them.
   Return 0 if that is a fault, or if Python must say why they are undefined. */
static __attribute__((noinline)) int find_undefined(Warp *w, const Instruction *i,
                                                    const Access *at, int width,
                                                    uint8_t (*undefined)[MOST_LOADED])
{
    Allocation *place = at->place;
    const int units = width / place->unit;
    if (!w->runner || !w->spaces[space_of(w, i)]->is_deferred || width > MOST_LOADED)
        return 0;
    for (int n = 0; n < at->count; n++) {
        const int64_t first = at->offsets[n] / place->unit;
        begin(place, first, first + units);
        if (!may_note_read(w, place, first, first + units))
            return 0;
        for (int k = 0; k < units; k++) {
            const int32_t writer = place->writes[first + k];
            const int known = knows(w, writer);
            if (known < 0)
                return 0;
            const int is_known = known || (w->swaps && w->events->atomic[writer]);
            memset(undefined[n] + k * place->unit, is_known ? 0 : 0xFF, (size_t)place->unit);
        }
    }
    return 1;
}

/* `definedness.mark`, of the n-th result. */
static __attribute__((noinline)) void mark_loaded(Warp *w, const Instruction *i, const Access *at,
                                                  int n, uint8_t (*undefined)[MOST_LOADED],
                                                  uint32_t mask)
{
    uint8_t bits[ROW];
    const int wide = w->widths[i->to[n]];
    for (int k = 0; k < at->count; k++) {
        uint8_t *to = bits + at->lanes[k] * wide;
        const uint8_t *from = undefined[k] + n * i->width;
        memcpy(to, from, i->width);
        memset(to + i->width, from[i->width - 1], (size_t)(wide - i->width)); /* the sign */
    }
    /* The cause is never read: where these bits matter, Python executes the block anew. */
    mark_undefined(w, i->to[n], bits, mask, UNINITIALISED);
}

static int load(Warp *w, const Instruction *i, uint32_t mask)
{
    _Alignas(64) uint8_t values[LANES * 8];
    uint8_t undefined[LANES][MOST_LOADED];
    Access at;
    const int width = i->width * i->results;
    if (!locate(w, i, mask, width, LANES, &at))
        return PYTHON;
    const int together = at.least == at.most ? 1 : at.count; /* all read one element */
    const int is_defined = may_read(w, at.place, at.offsets, together, width, 0);
    if ((!is_defined && !find_undefined(w, i, &at, width, undefined)) ||
        !note_lanes(w, &at, width, 0))
        return PYTHON;
    note_read(w, at.place, at.offsets, together, width, load_event(w, i));
    count_access(w, i, &at, width);
    for (int n = 0; n < i->results; n++) {
        if (i->to[n] < 0)
            continue;
        const int wide = w->widths[i->to[n]];
        const uint8_t *data = at.place->data + n * i->width;
        if (wide == i->width && (wide == 4 || wide == 2 || wide == 8)) {
            for (int k = 0; k < at.count; k++)
                copy_value(values, at.lanes[k], data + at.offsets[k], wide);
            put(w, i->to[n], values, mask);
            continue;
        }
        for (int k = 0; k < at.count; k++) {
            const uint8_t *from = data + at.offsets[k];
            uint8_t *to = values + at.lanes[k] * wide;
            memcpy(to, from, i->width);
            if (wide > i->width)
                memset(to + i->width, i->is_signed && from[i->width - 1] > 127 ? 255 : 0,
                       (size_t)(wide - i->width));
        }
        put(w, i->to[n], values, mask);
    }
    for (int n = 0; !is_defined && n < i->results; n++)
        if (i->to[n] >= 0)
            mark_loaded(w, i, &at, n, undefined, mask);
    return BUDGET;
}

/* Store the values of threads, `width` bytes each. */
static int store_values(Warp *w, const Instruction *i, const Access *at,
                        uint8_t (*values)[MOST_STORED], int width)
{
    int ordered = 1;
    for (int k = 1; k < at->count; k++) {
        ordered &= at->offsets[k] > at->offsets[k - 1];
        for (int n = 0; n < k && !ordered; n++)
            if (at->offsets[n] == at->offsets[k] && memcmp(values[n], values[k], (size_t)width))
                return PYTHON;
    }
    const int may_be_again = i->kind == STORE || i->kind == STORE_MATRIX;
    if (!may_write(w, at, width) && !(may_be_again && may_write_again(w, at, values, width)))
        return PYTHON;
    if (!note_lanes(w, at, width, 1))
        return PYTHON;
    note_write(w, at, width,
               add_event(w, i->line, w->store_name, w->index, w->times[w->index]));
    for (int64_t k = 0; k < at->count && w->undo;) {
        const int64_t first = k;
        k = end_of_run(at->offsets, k, at->count, width);
        keep(w, at->place, at->place->data + at->offsets[first], (k - first) * width);
    }
    for (int k = 0; k < at->count; k++)
        memcpy(at->place->data + at->offsets[k], values[k], (size_t)width);
    count_access(w, i, at, width);
    w->stores += space_of(w, i) == 0;
    return BUDGET;
}

static int store(Warp *w, const Instruction *i, uint32_t mask)
{
    _Alignas(64) uint8_t values[LANES][MOST_STORED];
    Access at;
    const int count = i->sources - 1, width = i->width * count;
    if (!locate(w, i, mask, width, LANES, &at))
        return PYTHON;
    for (int n = 0; n < count; n++) {
        const int wide = w->widths[i->from[n + 1]];
        const uint8_t *from = row(w, i->from[n + 1]);
        if (i->width == 4)
            for (int k = 0; k < at.count; k++)
                memcpy(values[k] + n * 4, from + at.lanes[k] * wide, 4);
        else
            for (int k = 0; k < at.count; k++)
                memcpy(values[k] + n * i->width, from + at.lanes[k] * wide, i->width);
    }
    return store_values(w, i, &at, values, width);
}

/* ldmatrix: lane 8 n + r has the address of row r of the n-th matrix of 8 × 8 halves. */
static int load_matrix(Warp *w, const Instruction *i)
{
    uint16_t result[LANES * 2];
    Access at;
    if (!locate(w, i, ALL, 16, 8 * i->results, &at) ||
        !may_read(w, at.place, at.offsets, at.count, 16, 0))
        return PYTHON;
    note_read(w, at.place, at.offsets, at.count, 16, load_event(w, i));
    count_shared(w, i, &at, 16);
    for (int n = 0; n < i->results; n++) {
        for (int k = 0; k < LANES * 2; k++) {
            const int r = i->transposed ? k % 8 : k / 8, column = i->transposed ? k / 8 : k % 8;
            memcpy(result + k, at.place->data + at.offsets[8 * n + r] + 2 * column, 2);
        }
        put(w, i->to[n], result, ALL);
    }
    return BUDGET;
}

/* stmatrix: the same addresses; a thread has two halves of each matrix. */
static int store_matrix(Warp *w, const Instruction *i)
{
    uint8_t values[LANES][MOST_STORED];
    Access at;
    const int count = i->sources - 1;
    if (!locate(w, i, ALL, 16, 8 * count, &at))
        return PYTHON;
    for (int n = 0; n < count; n++) {
        const uint8_t *from = row(w, i->from[n + 1]);
        for (int k = 0; k < LANES * 2; k++) {
            const int r = i->transposed ? k % 8 : k / 8, column = i->transposed ? k / 8 : k % 8;
            memcpy(values[8 * n + r] + 2 * column, from + 2 * k, 2);
        }
    }
    return store_values(w, i, &at, values, 16);
}

/* redux.sync: the integers of all threads together. */
static void reduce(Warp *w, const Instruction *i, uint32_t mask)
{
    _Alignas(64) uint32_t result[LANES];
    uint8_t each[ROW];
    const uint32_t *from = (void *)row(w, i->from[0]);
    const int first = __builtin_ctz(mask);
    uint32_t total[LANES] = {from[first]}, next[LANES] = {0};
    for (int n = first + 1; n < LANES; n++) {
        if (!(mask >> n & 1))
            continue;
        next[0] = from[n];
        i->function(each, total, next, 0);
        memcpy(total, each, 4);
    }
    for (int n = 0; n < LANES; n++)
        result[n] = total[0];
    put(w, i->to[0], result, mask);
}

/* elect.sync: a thread is chosen, the same one each time. */
static void elect(Warp *w, const Instruction *i)
{
    uint32_t chosen[LANES];
    uint8_t is_chosen[LANES];
    for (int n = 0; n < LANES; n++) {
        chosen[n] = (uint32_t)w->elected;
        is_chosen[n] = n == w->elected;
    }
    if (i->to[0] >= 0)
        put(w, i->to[0], chosen, ALL);
    put(w, i->to[1], is_chosen, ALL);
}

/* mma.sync.m16n8k16 of halves: D = A·B + C in float64, rounded once. */
static void product(Warp *w, const Instruction *i)
{
    double a[16][16], b[8][16];
    float d[4][LANES];
    const int is_f16 = i->mode;
    for (int n = 0; n < LANES; n++) {
        const int r = n / 4, column = n % 4 * 2;
        for (int k = 0; k < 4; k++) {
            const uint32_t pair = ((const uint32_t *)row(w, i->from[k]))[n];
            for (int half = 0; half < 2; half++) {
                const uint16_t bits = (uint16_t)(pair >> 16 * half);
                a[r + k % 2 * 8][column + k / 2 * 8 + half] =
                    is_f16 ? of_f16(bits) : of_bf16(bits);
            }
        }
        for (int k = 0; k < 2; k++) {
            const uint32_t pair = ((const uint32_t *)row(w, i->from[4 + k]))[n];
            for (int half = 0; half < 2; half++) {
                const uint16_t bits = (uint16_t)(pair >> 16 * half);
                b[r][column + k * 8 + half] = is_f16 ? of_f16(bits) : of_bf16(bits);
            }
        }
    }
    for (int n = 0; n < LANES; n++)
        for (int k = 0; k < 4; k++) {
            const int r = n / 4 + k / 2 * 8, column = n % 4 * 2 + k % 2;
            double sum = 0;
            for (int m = 0; m < 16; m++)
                sum += a[r][m] * b[column][m];
            d[k][n] = (float)(sum + ((const float *)row(w, i->from[6 + k]))[n]);
        }
    for (int k = 0; k < 4; k++)
        put(w, i->to[k], d[k], ALL);
}

/* cp.async: copies of a group, which is one asynchronous operation. */
typedef struct {
    uint8_t *to;
    const uint8_t *from; /* null for zeros */
    uint8_t value[16];
    int32_t width;
} Part;

typedef struct Copies {
    Part *parts;
    int64_t count, capacity;
    int32_t agent, name, time, done; /* steps that are done: read, and written */
} Copies;

void read_copies(Copies *copies)
{
    for (int64_t n = 0; n < copies->count; n++) {
        Part *one = &copies->parts[n];
        if (one->from)
            memcpy(one->value, one->from, (size_t)one->width);
        else
            memset(one->value, 0, (size_t)one->width);
    }
    copies->done = 1;
}

void free_copies(Copies *copies)
{
    free(copies->parts);
    copies->parts = 0;
    copies->count = copies->capacity = 0;
}

void write_copies(Copies *copies)
{
    for (int64_t n = 0; n < copies->count; n++)
        memcpy(copies->parts[n].to, copies->parts[n].value, (size_t)copies->parts[n].width);
    free_copies(copies);
    copies->done = 2;
}

static Copies *begin_copies(Warp *w);

static int copy(Warp *w, const Instruction *i, uint32_t mask)
{
    Access to, from;
    Copies *copies = w->copies;
    const int width = i->width;
    const uint32_t *counts = i->sources > 2 ? (void *)row(w, i->from[2]) : 0;
    uint32_t inside = mask;
    if (w->events->count + 2 > w->events->capacity)
        return w->runner ? GROW : PYTHON;
    if (!copies && w->runner)
        copies = begin_copies(w);
    if (!copies)
        return PYTHON;
    for (int n = 0; counts && n < LANES; n++)
        if (mask >> n & 1) {
            if (counts[n] != 0 && counts[n] != (uint32_t)width)
                return PYTHON;
            if (!counts[n])
                inside &= ~(1u << n);
        }
    if (!locate_at(w, i->from[0], i->offset, w->spaces[1], mask, width, LANES, &to) ||
        !may_write(w, &to, width))
        return PYTHON;
    if (inside && (!locate_at(w, i->from[1], i->second_offset, w->spaces[0], inside, width, LANES,
                              &from) ||
                   !may_read(w, from.place, from.offsets, from.count, width, 0)))
        return PYTHON;
    if (copies->count + LANES > copies->capacity) {
        const int64_t capacity = 2 * copies->capacity + 256;
        Part *parts = realloc(copies->parts, (size_t)capacity * sizeof *parts);
        if (!parts)
            return PYTHON;
        copies->parts = parts;
        copies->capacity = capacity;
    }
    const int32_t read =
        add_event(w, i->line, copies->name, copies->agent, copies->time + 1);
    const int32_t written =
        add_event(w, i->line, copies->name, copies->agent, copies->time + 2);
    note_write(w, &to, width, written);
    count_shared(w, i, &to, width);
    if (inside) {
        note_read(w, from.place, from.offsets, from.count, width, read);
        count_global(w, i, &from, width);
    }
    int next = 0;
    for (int k = 0; k < to.count; k++) {
        Part *one = &copies->parts[copies->count++];
        const int is_inside = inside >> to.lanes[k] & 1;
        one->width = width;
        one->to = to.place->data + to.offsets[k];
        one->from = is_inside ? from.place->data + from.offsets[next++] : 0;
        memset(one->to, 0xFF, (size_t)width); /* memory.POISON */
    }
    /* If others of the group are done already, so is this one. */
    if (copies->done == 2) {
        read_copies(copies);
        write_copies(copies);
    } else if (copies->done == 1)
        read_copies(copies);
    return BUDGET;
}

/* `memory.Space.read` of an asynchronous operation. Return whether it is done. */
int read_many(Warp *w, Space *space, const int64_t *addresses, int64_t count, int width,
              int32_t event, const int32_t *fenced)
{
    int64_t offsets[1024];
    if (count > 1024 || !count)
        return 0;
    Allocation *place = find(space, (uint64_t)addresses[0]);
    if (!place || place->unit > width)
        return 0;
    for (int64_t n = 0; n < count; n++) {
        const uint64_t address = (uint64_t)addresses[n];
        if (address < place->start || address + (uint64_t)width > place->end)
            return 0;
        offsets[n] = (int64_t)(address - place->base);
        if (offsets[n] & (width - 1))
            return 0;
    }
    if (!may_read(w, place, offsets, count, width, fenced))
        return 0;
    note_read(w, place, offsets, count, width, event);
    return 1;
}

/* The formats of operands, as `native.KINDS` numbers them, and the bytes of a number. */
enum { BF16, F16, TF32, S8, U8, E4M3, E5M2 };

static inline int bytes_of(int kind) { return kind == TF32 ? 4 : kind < TF32 ? 2 : 1; }

static inline float of_e4m3(uint8_t x)
{
    /* A half has one more bit of the exponent, whose bias is larger by 8. */
    return (x & 127) == 127 ? NAN : 256 * of_f16((uint16_t)((x & 128) << 8 | (x & 127) << 7));
}

/* The numbers in 16 bytes. */
static void numbers(float *to, const uint8_t *from, int kind)
{
    uint16_t halves[8];
    uint32_t words[4];
    memcpy(halves, from, 16);
    memcpy(words, from, 16);
    switch (kind) {
    case BF16:
        for (int k = 0; k < 8; k++)
            to[k] = of_bf16(halves[k]);
        break;
    case F16:
        for (int k = 0; k < 8; k++)
            to[k] = of_f16(halves[k]);
        break;
    case TF32: /* the last 13 bits are ignored */
        for (int k = 0; k < 4; k++) {
            words[k] &= 0xFFFFE000u;
            memcpy(&to[k], &words[k], 4);
        }
        break;
    default:
        for (int k = 0; k < 16; k++)
            to[k] = kind == S8     ? (float)(int8_t)from[k]
                    : kind == U8   ? (float)from[k]
                    : kind == E4M3 ? of_e4m3(from[k])
                                   : of_f16((uint16_t)(from[k] << 8));
    }
}

/* The numbers of an operand of wgmma, from its chunks of 16 bytes: `tensor_cores.Matrix.read`. */
int decode_matrix(double *to, Space *space, const int64_t *addresses, int64_t rows, int by_rows,
                  int kind)
{
    const Allocation *place = find(space, (uint64_t)addresses[0]);
    const int width = bytes_of(kind), of_chunk = 16 / width;
    if (!place || (!by_rows && width != 2))
        return 0;
    for (int64_t n = 0; n < 2 * rows; n++) {
        const uint64_t address = (uint64_t)addresses[n];
        if (address < place->start || address + 16 > place->end)
            return 0;
        float found[16];
        numbers(found, place->data + (address - place->base), kind);
        for (int k = 0; k < of_chunk; k++)
            if (by_rows)
                to[n * of_chunk + k] = found[k];
            else /* a chunk has 8 rows of a column */
                to[(n / 16 * 8 + k) * 16 + n % 16] = found[k];
    }
    return 1;
}

/* Whether a register that is read is that of a product's sum, for which the warp waits now. */
static int becomes_ready(Warp *w, int32_t n)
{
    return w->runner && w->states[n] == PENDING && wait_early(w, n);
}

/* Execute at most `budget` instructions, and none from `limit` on. Return why it stopped. */
int run(Warp *w, int64_t budget, int32_t limit)
{
    Bits undefined;
    for (; budget > 0; budget--) {
        const int32_t pc = w->pc;
        if (pc >= limit)
            return REACHED;
        const Instruction *i = &w->program[pc];
        uint32_t mask = w->active;
        if (w->undo && w->undo->used > MOST_UNDONE)
            return PYTHON;
        if (i->kind == LEFT || (i->kind >= RETURN && !w->runner) || (i->whole && mask != ALL))
            return PYTHON;
        if (i->guard >= 0) {
            if (!in_row(w, i->guard))
                return PYTHON;
            const uint32_t bits = bits_of(row(w, i->guard));
            mask &= i->negated ? ~bits : bits;
        }
        if (mask != ALL && !i->table)
            for (int n = 0; n < i->results; n++)
                if (i->to[n] >= 0 && !in_row(w, i->to[n]) && !may_be_kept(w, i, n))
                    return PYTHON;
        if (mask) {
            if (i->whole && mask != ALL)
                return PYTHON;
            int is_defined = 1;
            for (int n = 0; n < i->sources; n++)
                is_defined &= in_row(w, i->from[n]) || becomes_ready(w, i->from[n]);
            if (w->events->count == w->events->capacity)
                return GROW;
            if (!is_defined && !find_bits(w, i, mask, &undefined))
                return PYTHON;
            int left = BUDGET;
            switch (i->kind) {
            case ELEMENTWISE: elementwise(w, i, mask); break;
            case PACK: pack(w, i, mask); break;
            case SHUFFLE: left = shuffle(w, i, ALL); break;
            case LOAD: left = load(w, i, mask); break;
            case STORE: left = store(w, i, mask); break;
            case LOAD_MATRIX: left = load_matrix(w, i); break;
            case STORE_MATRIX: left = store_matrix(w, i); break;
            case ELECT: elect(w, i); break;
            case REDUCE: reduce(w, i, ALL); break;
            case PRODUCT: product(w, i); break;
            case COPY: left = copy(w, i, mask); break;
            case NOTHING: break;
            case BRANCH:
                if (mask != w->active)
                    return PYTHON;
                w->pc = i->target - 1;
                break;
            default: left = of_block(w, i, mask);
            }
            if (left == PYTHON || left == GROW)
                return left;
            if (!is_defined)
                mark_results(w, i, mask, &undefined);
            int64_t *row = w->counts + COLUMNS * pc;
            row[EXECUTIONS]++;
            row[THREADS] += __builtin_popcount(mask);
            if (left == STOPPED) {
                w->pc++;
                w->count++;
                return STOPPED;
            }
        }
        w->pc++;
        w->count++;
    }
    return BUDGET;
}
