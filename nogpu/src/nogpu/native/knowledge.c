/* SPDX-License-Identifier: MIT
 *
 * What the warps of a block know: of its agents, as `vector_clocks.VectorClocks` has it, and of other
 * blocks, by what those have released at an address (`atomics`).
 */

#include "simt.c"

enum { BARRIERS = 16, MOST_WARPS = 64, MOST_ELEMENTS = 4, SPINS = 4, MOST_MBARRIERS = 64 };
enum { MOST_BOX_BYTES = 232448 }; /* what a block may have of shared memory */
enum { OF_COPIES, OF_PRODUCTS }; /* families of groups */
enum { TRIGGERED = 1, WAITED = 2, EARLY = 4, WAIT_ADDRESS = 1 }; /* of griddepcontrol */

/* An asynchronous operation: a group of cp.async, or a wgmma. */
typedef struct {
    int32_t agent;
    const Instruction *product; /* or null */
} Operation;

/* Operations in their order, some of which have been waited for, and the ends of groups. */
typedef struct {
    Operation *operations;
    int32_t *ends; /* of the groups that were committed: behind their last operations */
    int32_t count, operation_capacity, groups, group_capacity, first_group, first;
} Family;

/* What is known at an mbarrier, by agent: by those that have arrived in the present phase, and in
   those that have ended. */
enum { TIMES, FENCED, ENDED, PARTS = 4 };

typedef struct {
    int64_t offset, bytes; /* that are missing */
    int32_t pending, count, phase;
    int32_t is_live, has_parts, is_loading; /* boxes that nobody has waited for */
    int32_t *parts;                         /* `PARTS` arrays */
    Known *known[2];                        /* of other blocks */
} Mbarrier;

/* A tensormap in global memory; `acquired` is the event of the last fence, or -1. */
typedef struct {
    const Allocation *place;
    int64_t row; /* of 128 bytes */
    int32_t published, acquired;
} Tensormap;

/* A bulk copy to global memory, of a thread's group. */
typedef struct {
    int32_t lane, group, agent;
} Bulk;

/* Bytes side by side of a box: where they lie in global memory, and in the box. */
typedef struct {
    int64_t offset, bytes, start;
} Stretch;

typedef struct {
    Family families[2];
    Copies copies;     /* the open group */
    int32_t copy_name; /* of events */
    int32_t product_name;
    int32_t has_fence;
    uint32_t *fence_versions; /* of the registers, at the last wgmma.fence */
    int32_t *owners;          /* of a register: the operation that will write it */
    int32_t done, waiting, mbarrier, parity; /* for which mbarrier it waits, or -1 */
    int32_t has_waited;                      /* for earlier grids */
    Bulk *bulk;
    int64_t bulk_count, bulk_capacity;
    int32_t committed[LANES], deleted[LANES]; /* groups of bulk copies */
} State;

/* A row of the registers that holds a coordinate of the block's position. */
typedef struct {
    int32_t row, width, axis;
} Coordinate;

/* What atomics have found, the last time: when they find it again, they may be waiting. */
typedef struct {
    const Allocation *place; /* or null */
    int64_t count, offsets[LANES];
    uint8_t values[MOST_ELEMENTS][LANES * 8];
} Found;

typedef struct Chunk {
    struct Chunk *next;
    int64_t used, capacity;
    _Alignas(16) uint8_t bytes[];
} Chunk;

typedef struct {
    uint64_t address;
    Known *known; /* or null */
} Release;

/* What blocks have released, by address: a table whose entries lie where their hash says, or behind.
   Its content lies in chunks, parts of which are no longer used. */
typedef struct {
    Release *table, *before; /* `before` is what the present block has replaced */
    int64_t count, capacity, changes, change_capacity;
    Chunk *chunks;
    int64_t bytes, live_bytes;
    Known *merged[3]; /* the last two that were merged, and the result */
} Releases;

typedef struct Runner {
    /* Set by Python. */
    Warp *warps;
    State *states;
    const uint8_t *template_states;
    const Coordinate *coordinates;
    Allocation *shared;
    Events *events;
    int64_t *counts, *total_counts; /* of the present block, and of all */
    uint8_t *controls;              /* of each block, or null: `dependents` */
    int64_t count_size, rows, limit;
    int32_t warp_count, coordinate_count, copies_need_fence, atomics;
    /* Its own. */
    int32_t agents, capacity;
    int32_t *times, *fenced; /* of each warp, by agent */
    int32_t arrived[BARRIERS], arrivals[BARRIERS][MOST_WARPS];
    Undo undo;
    int64_t executed, stores; /* by the blocks that have ended */
    int32_t fault_pc;         /* where the last block was left to Python */
    int32_t spins, finer;
    int32_t votes[BARRIERS], voters[BARRIERS]; /* of `bar.red` */
    Allocation *coarse; /* of global memory, whose shadow must be finer for the last block */
    Found *found; /* by warp and atomic */
    Releases releases;
    Tensormap *maps, *maps_before;
    int64_t map_count, map_capacity, map_count_before;
    Stretch *runs;
    int64_t run_count;
    uint8_t *box;
    Mbarrier mbarriers[MOST_MBARRIERS];
    int64_t places[MOST_MBARRIERS]; /* of those that live */
} Runner;

/* What warps know of their block. */

static void set_knowledge(Runner *r)
{
    for (int n = 0; n < r->warp_count; n++)
        r->warps[n].times = r->times + (int64_t)n * r->capacity;
}

static void grow_agents(Runner *r)
{
    const int32_t before = r->capacity, after = 2 * before;
    int32_t **both[2] = {&r->times, &r->fenced};
    for (int k = 0; k < 2; k++) {
        int32_t *made = calloc((size_t)r->warp_count * after, 4);
        if (!made)
            abort();
        for (int n = 0; n < r->warp_count; n++)
            memcpy(made + (int64_t)n * after, *both[k] + (int64_t)n * before, 4 * (size_t)before);
        free(*both[k]);
        *both[k] = made;
    }
    for (int n = 0; n < MOST_MBARRIERS; n++)
        if (r->mbarriers[n].parts) {
            int32_t *made = calloc(PARTS * (size_t)after, 4);
            if (!made)
                abort();
            for (int k = 0; k < PARTS; k++)
                memcpy(made + (int64_t)k * after, r->mbarriers[n].parts + (int64_t)k * before,
                       4 * (size_t)before);
            free(r->mbarriers[n].parts);
            r->mbarriers[n].parts = made;
        }
    r->capacity = after;
    set_knowledge(r);
}

static int32_t add_agent(Runner *r, int is_generic)
{
    if (r->agents == r->capacity)
        grow_agents(r);
    if (!is_generic)
        for (int n = 0; n < r->warp_count; n++)
            r->fenced[(int64_t)n * r->capacity + r->agents] = 2;
    return r->agents++;
}

/* What warps know of other blocks. */

static void *take(Releases *all, int64_t size)
{
    Chunk *chunk = all->chunks;
    size = (size + 15) & ~15;
    if (!chunk || chunk->used + size > chunk->capacity) {
        const int64_t capacity = size > 65536 ? size : 65536;
        chunk = malloc(sizeof *chunk + (size_t)capacity);
        if (!chunk)
            abort();
        chunk->next = all->chunks;
        chunk->used = 0;
        chunk->capacity = capacity;
        all->chunks = chunk;
    }
    uint8_t *found = chunk->bytes + chunk->used;
    chunk->used += size;
    all->bytes += size;
    return found;
}

static void free_chunks(Chunk *chunk)
{
    while (chunk) {
        Chunk *next = chunk->next;
        free(chunk);
        chunk = next;
    }
}

static Times *new_times(Releases *all, int64_t count)
{
    Times *made = take(all, (int64_t)sizeof *made + 4 * count);
    made->moved = 0;
    made->count = count;
    return made;
}

static Known *new_known(Releases *all, int64_t count)
{
    Known *made = take(all, (int64_t)sizeof *made + count * (int64_t)sizeof(Past));
    made->moved = 0;
    made->count = count;
    return made;
}

/* Whether none of the times of `b` is later than that of `a`. */
static int covers(const Times *a, const Times *b)
{
    if (a->count < b->count)
        return 0;
    for (int64_t n = 0; n < b->count; n++)
        if (b->of[n] > a->of[n])
            return 0;
    return 1;
}

/* The later ones of two blocks' times; those of one of the two, if it has them. */
static Times *later(Releases *all, Times *a, Times *b)
{
    if (a == b || covers(a, b))
        return a;
    if (covers(b, a))
        return b;
    const Times *longer = a->count > b->count ? a : b, *other = longer == a ? b : a;
    Times *made = new_times(all, longer->count);
    for (int64_t n = 0; n < longer->count; n++) {
        const int32_t time = n < other->count ? other->of[n] : 0;
        made->of[n] = time > longer->of[n] ? time : longer->of[n];
    }
    return made;
}

static Known *merge(Releases *all, Known *a, Known *b)
{
    if (!b || a == b)
        return a;
    if (!a)
        return b;
    if (all->merged[0] == a && all->merged[1] == b)
        return all->merged[2];
    Known *made = new_known(all, a->count + b->count);
    int64_t n = 0, k = 0, count = 0;
    int is_a = 1, is_b = 1;
    while (n < a->count || k < b->count) {
        const Past *of_a = n < a->count ? &a->pasts[n] : 0;
        const Past *of_b = k < b->count ? &b->pasts[k] : 0;
        Past *to = &made->pasts[count++];
        if (!of_b || (of_a && of_a->block < of_b->block)) {
            *to = *of_a;
            n++;
            is_b = 0;
        } else if (!of_a || of_b->block < of_a->block) {
            *to = *of_b;
            k++;
            is_a = 0;
        } else {
            to->block = of_a->block;
            to->times = later(all, of_a->times, of_b->times);
            n++;
            k++;
            is_a &= to->times == of_a->times;
            is_b &= to->times == of_b->times;
        }
    }
    made->count = count;
    all->merged[0] = a;
    all->merged[1] = b;
    return all->merged[2] = is_a ? a : is_b ? b : made;
}

/* `VectorClocks.release`: what the warp knows now; it begins another time, which nobody knows. */
static Known *snapshot(Warp *w)
{
    Runner *r = w->runner;
    Times *times = new_times(&r->releases, r->agents);
    Known *mine = new_known(&r->releases, 1);
    memcpy(times->of, w->times, 4 * (size_t)r->agents);
    mine->pasts[0] = (Past){w->block, times};
    w->times[w->index]++;
    return merge(&r->releases, w->foreign, mine);
}

/* `VectorClocks.acquire`. What is known of the warp's own block stays among that of the others. */
static void learn(Warp *w, Known *known)
{
    if (!known || known == w->foreign)
        return;
    const Times *mine = past_of(known, w->block);
    for (int64_t a = 0; mine && a < mine->count; a++)
        w->times[a] = mine->of[a] > w->times[a] ? mine->of[a] : w->times[a];
    w->foreign = merge(&w->runner->releases, w->foreign, known);
}

/* The table of what was released. */

static Release *released_at(const Releases *all, uint64_t address)
{
    uint64_t n = address * 0x9E3779B97F4A7C15u >> 20;
    for (;; n++) {
        Release *one = &all->table[n & (uint64_t)(all->capacity - 1)];
        if (one->address == address || !one->address)
            return one;
    }
}

static void grow_releases(Releases *all)
{
    Release *before = all->table;
    const int64_t count = all->capacity;
    all->capacity = count ? 2 * count : 64;
    all->table = calloc((size_t)all->capacity, sizeof *all->table);
    if (!all->table)
        abort();
    for (int64_t n = 0; n < count; n++)
        if (before[n].address)
            *released_at(all, before[n].address) = before[n];
    free(before);
}

static void set_released(Releases *all, uint64_t address, Known *known)
{
    if (2 * all->count >= all->capacity)
        grow_releases(all);
    Release *one = released_at(all, address);
    all->count += !one->address;
    one->address = address;
    one->known = known;
}

static void release(Warp *w, uint64_t address, Known *known)
{
    Releases *all = &w->runner->releases;
    Known *before = all->capacity ? released_at(all, address)->known : 0;
    Known *after = merge(all, before, known);
    if (before == after)
        return;
    if (all->changes == all->change_capacity) {
        all->change_capacity = 2 * all->change_capacity + 64;
        all->before = realloc(all->before, (size_t)all->change_capacity * sizeof *all->before);
        if (!all->before)
            abort();
    }
    all->before[all->changes++] = (Release){address, before};
    set_released(all, address, after);
}

static void acquire(Warp *w, uint64_t address)
{
    const Releases *all = &w->runner->releases;
    if (all->capacity)
        learn(w, released_at(all, address)->known);
}

static void undo_releases(Releases *all)
{
    while (all->changes > 0) {
        const Release *one = &all->before[--all->changes];
        set_released(all, one->address, one->known);
    }
}

static Known *moved(Releases *all, Known *one)
{
    if (one->moved)
        return one->moved;
    Known *made = one->moved = new_known(all, one->count);
    for (int64_t n = 0; n < one->count; n++) {
        Times *times = one->pasts[n].times;
        if (!times->moved) {
            times->moved = new_times(all, times->count);
            memcpy(times->moved->of, times->of, 4 * (size_t)times->count);
        }
        made->pasts[n] = (Past){one->pasts[n].block, times->moved};
    }
    return made;
}

/* Between blocks: move what the table has to new chunks, if most of the old ones is no longer used. */
static void tidy_releases(Releases *all)
{
    all->changes = 0;
    if (all->bytes < 2 * all->live_bytes + (1 << 22))
        return;
    Chunk *before = all->chunks;
    all->chunks = 0;
    all->bytes = 0;
    memset(all->merged, 0, sizeof all->merged);
    for (int64_t n = 0; n < all->capacity; n++)
        if (all->table[n].known)
            all->table[n].known = moved(all, all->table[n].known);
    all->live_bytes = all->bytes;
    free_chunks(before);
}

static void free_releases(Releases *all)
{
    free(all->table);
    free(all->before);
    free_chunks(all->chunks);
    memset(all, 0, sizeof *all);
}

/* For Python, which reads the table, and replaces it. */

void clear_releases(Runner *r) { free_releases(&r->releases); }

Times *add_times(Runner *r, const int32_t *times, int64_t count)
{
    Times *made = new_times(&r->releases, count);
    memcpy(made->of, times, 4 * (size_t)count);
    return made;
}

/* The blocks are in order. */
void add_release(Runner *r, uint64_t address, int64_t count, const int64_t *blocks,
                 Times *const *times)
{
    Known *made = new_known(&r->releases, count);
    for (int64_t n = 0; n < count; n++)
        made->pasts[n] = (Past){blocks[n], times[n]};
    set_released(&r->releases, address, made);
}
