/* SPDX-License-Identifier: MIT
 *
 * mbarriers, tensormaps, and bulk copies of boxes of tensors (TMA): what `tensors` does in Python
 * for one block, where a copy is complete when it is issued. Reductions of boxes are Python's.
 */

#include "atomics.c"

static inline int first_lane(uint32_t mask) { return __builtin_ctz(mask); }

static inline int is_single(uint32_t mask) { return !(mask & (mask - 1)); }

static uint32_t word_of(const Warp *w, int32_t n, int lane)
{
    return ((const uint32_t *)row(w, n))[lane];
}

static void *grown(void *content, int64_t size)
{
    void *made = realloc(content, (size_t)size);
    if (!made)
        abort();
    return made;
}

/* mbarriers. */

static const int32_t *part_of(const Runner *r, const Mbarrier *one, int part)
{
    return one->parts + (int64_t)part * r->capacity;
}

static void note_latest(int32_t *to, const int32_t *from, int32_t count)
{
    for (int32_t a = 0; a < count; a++)
        to[a] = from[a] > to[a] ? from[a] : to[a];
}

/* The mbarrier at an address of one thread, or null. */
static Mbarrier *mbarrier_at(Warp *w, int32_t base, int64_t added, int lane)
{
    Runner *r = w->runner;
    Access at;
    if (!locate_at(w, base, added, w->spaces[1], 1u << lane, 8, LANES, &at))
        return 0;
    const int64_t first = at.least / at.place->unit;
    if (!knows_writers(w, at.place, first, first + 8 / at.place->unit, 0))
        return 0;
    for (int n = 0; n < MOST_MBARRIERS; n++)
        if (r->mbarriers[n].is_live && r->mbarriers[n].offset == at.least)
            return &r->mbarriers[n];
    return 0;
}

/* Note where mbarriers lie, for stores. */
static void tell_mbarriers(Runner *r)
{
    int32_t count = 0;
    for (int n = 0; n < MOST_MBARRIERS; n++)
        if (r->mbarriers[n].is_live)
            r->places[count++] = r->mbarriers[n].offset;
    r->shared->barriers = r->places;
    r->shared->barrier_count = count;
}

static Mbarrier *free_mbarrier(Runner *r)
{
    for (int n = 0; n < MOST_MBARRIERS; n++) {
        const Mbarrier *one = &r->mbarriers[n];
        int is_used = one->is_live || one->is_loading;
        for (int k = 0; k < r->warp_count; k++)
            is_used |= r->states[k].mbarrier == n;
        if (!is_used)
            return &r->mbarriers[n];
    }
    return 0;
}

static int mbarrier_init(Warp *w, const Instruction *i, uint32_t mask)
{
    Runner *r = w->runner;
    uint8_t zeros[LANES][MOST_STORED] = {{0}};
    Access at;
    Mbarrier *one = free_mbarrier(r);
    if (!one || !is_single(mask) || !locate(w, i, mask, 8, LANES, &at) ||
        store_values(w, i, &at, zeros, 8) != BUDGET)
        return PYTHON;
    int32_t *parts = one->parts;
    if (!parts && !(parts = malloc(4 * PARTS * (size_t)r->capacity)))
        abort();
    memset(parts, 0, 4 * PARTS * (size_t)r->capacity);
    memset(one, 0, sizeof *one);
    one->parts = parts;
    one->offset = at.least;
    one->count = one->pending = (int32_t)word_of(w, i->from[1], first_lane(mask));
    one->is_live = 1;
    tell_mbarriers(r);
    return BUDGET;
}

static int mbarrier_inval(Warp *w, const Instruction *i, uint32_t mask)
{
    Mbarrier *one = is_single(mask) ? mbarrier_at(w, i->from[0], i->offset, first_lane(mask)) : 0;
    if (!one || one->has_parts || one->pending != one->count)
        return PYTHON;
    one->is_live = 0;
    tell_mbarriers(w->runner);
    return BUDGET;
}

/* `Barrier.update`: a phase ends when no arrival and no byte is missing. */
static void update_mbarrier(Runner *r, Mbarrier *one, int32_t arrivals, int64_t bytes)
{
    one->pending -= arrivals;
    one->bytes += bytes;
    if (one->pending || one->bytes)
        return;
    one->phase++;
    one->pending = one->count;
    for (int part = 0; part < 2; part++) {
        int32_t *from = (int32_t *)part_of(r, one, part);
        note_latest((int32_t *)part_of(r, one, part + ENDED), from, r->agents);
        memset(from, 0, 4 * (size_t)r->agents);
    }
    one->known[1] = merge(&r->releases, one->known[1], one->known[0]);
    one->known[0] = 0;
    one->has_parts = 0;
}

/* Who waits for the phase learns what the warp knows now. */
static int mbarrier_arrive(Warp *w, const Instruction *i, uint32_t mask)
{
    Runner *r = w->runner;
    const int lane = first_lane(mask), expects = i->mode;
    Mbarrier *one = mbarrier_at(w, i->from[0], i->offset, lane);
    if (!one || (expects && !is_single(mask)))
        return PYTHON;
    const int32_t given = i->sources > 1 ? (int32_t)word_of(w, i->from[1], lane) : 0;
    const int32_t arrivals = expects ? 1 : i->sources > 1 ? given : __builtin_popcount(mask);
    note_latest((int32_t *)part_of(r, one, TIMES), w->times, r->agents);
    note_latest((int32_t *)part_of(r, one, FENCED),
                r->fenced + (int64_t)w->index * r->capacity, r->agents);
    one->known[0] = merge(&r->releases, one->known[0], w->foreign);
    one->has_parts = 1;
    w->times[w->index]++;
    update_mbarrier(r, one, arrivals, expects ? (uint32_t)given : 0);
    return BUDGET;
}

static int has_ended(const Mbarrier *one, int32_t odd) { return one->phase % 2 != odd; }

/* `tensors._count_wait`: the first wait for boxes. */
static void count_wait(Runner *r, const Instruction *i, const Warp *w, Mbarrier *one)
{
    if (!one->is_loading)
        return;
    one->is_loading = 0;
    int64_t in_flight = 0, *row = counts_of(w, i);
    for (int n = 0; n < MOST_MBARRIERS; n++)
        in_flight += r->mbarriers[n].is_loading;
    row[WAITS]++;
    row[IN_FLIGHT] += in_flight;
    row[MOST_IN_FLIGHT] = in_flight > row[MOST_IN_FLIGHT] ? in_flight : row[MOST_IN_FLIGHT];
}

static int mbarrier_wait(Warp *w, const Instruction *i)
{
    Runner *r = w->runner;
    State *s = &r->states[w->index];
    uint8_t ended[LANES];
    Mbarrier *one = mbarrier_at(w, i->from[0], i->offset, 0);
    const int32_t odd = (int32_t)word_of(w, i->from[1], 0);
    if (!one)
        return PYTHON;
    memset(ended, has_ended(one, odd), sizeof ended);
    put(w, i->to[0], ended, ALL);
    if (!ended[0]) {
        s->waiting = 1;
        s->mbarrier = (int32_t)(one - r->mbarriers);
        s->parity = odd;
        return STOPPED;
    }
    note_latest(w->times, part_of(r, one, TIMES + ENDED), r->agents);
    note_latest(r->fenced + (int64_t)w->index * r->capacity, part_of(r, one, FENCED + ENDED),
                r->agents);
    w->foreign = merge(&r->releases, w->foreign, one->known[1]);
    count_wait(r, i, w, one);
    return BUDGET;
}

/* Tensormaps: which of them were published, and acquired by the tensormap proxy. */

static Tensormap *map_at(Runner *r, const Allocation *place, int64_t row)
{
    for (int64_t n = r->map_count - 1; n >= 0; n--)
        if (r->maps[n].place == place && r->maps[n].row == row)
            return &r->maps[n];
    return 0;
}

/* Python gives those that it knows, and reads them later. */
void add_map(Runner *r, const Allocation *place, int64_t row, int32_t published, int32_t acquired)
{
    if (r->map_count == r->map_capacity) {
        r->map_capacity = 2 * r->map_capacity + 16;
        r->maps = grown(r->maps, r->map_capacity * (int64_t)sizeof *r->maps);
        r->maps_before = grown(r->maps_before, r->map_capacity * (int64_t)sizeof *r->maps);
    }
    r->maps[r->map_count++] = (Tensormap){place, row, published, acquired};
}

static int replace_field(Warp *w, const Instruction *i, uint32_t mask)
{
    uint8_t values[LANES][MOST_STORED];
    Access map, at;
    /* The fields that are not replaced must have been written. */
    if (!locate_at(w, i->from[0], i->offset, w->spaces[1], mask, 128, LANES, &map))
        return PYTHON;
    for (int k = 0; k < map.count; k++) {
        const int64_t first = map.offsets[k] / map.place->unit;
        if (!knows_writers(w, map.place, first, first + 128 / map.place->unit, 0))
            return PYTHON;
    }
    if (!locate_at(w, i->from[0], i->second_offset, w->spaces[1], mask, i->width, LANES, &at))
        return PYTHON;
    for (int k = 0; k < at.count; k++)
        memcpy(values[k], row(w, i->from[1]) + at.lanes[k] * i->width, i->width);
    return store_values(w, i, &at, values, i->width);
}

/* Copy a tensormap to global memory, for the tensormap proxy to acquire. */
static int publish_map(Warp *w, const Instruction *i)
{
    Runner *r = w->runner;
    Access to, from;
    if (w->events->count + 2 > w->events->capacity)
        return GROW;
    if (!locate_at(w, i->from[1], i->second_offset, w->spaces[1], 1, 128, LANES, &from) ||
        !may_read(w, from.place, from.offsets, 1, 128, 0) ||
        !locate_at(w, i->from[0], i->offset, w->spaces[0], 1, 128, LANES, &to) ||
        !may_write(w, &to, 128))
        return PYTHON;
    note_read(w, from.place, from.offsets, 1, 128, load_event(w, i));
    count_shared(w, i, &from, 128);
    note_write(w, &to, 128,
               add_event(w, i->line, w->store_name, w->index, w->times[w->index]));
    count_global(w, i, &to, 128);
    uint8_t *where = to.place->data + to.least;
    keep(w, to.place, where, 128);
    memcpy(where, from.place->data + from.least, 128);
    Tensormap *map = map_at(r, to.place, to.least / 128);
    if (map) {
        map->published = 1;
        map->acquired = -1;
    } else
        add_map(r, to.place, to.least / 128, 1, -1);
    return BUDGET;
}

/* The tensormap at an address of global memory, if the warp knows who has written it. */
static Tensormap *known_map(Warp *w, int32_t base, int64_t added, int lane, Access *at)
{
    if (!locate_at(w, base, added, w->spaces[0], 1u << lane, 128, LANES, at))
        return 0;
    const int64_t first = at->least / at->place->unit;
    if (!knows_writers(w, at->place, first, first + 128 / at->place->unit, 0))
        return 0;
    return map_at(w->runner, at->place, at->least / 128);
}

static int acquire_map(Warp *w, const Instruction *i, uint32_t mask)
{
    Access at;
    Tensormap *map = known_map(w, i->from[0], i->offset, first_lane(mask), &at);
    if (!map || !map->published)
        return PYTHON;
    map->acquired = add_event(w, i->line, w->fence_name, w->index, w->times[w->index]);
    return BUDGET;
}

/* Boxes. */

enum { MOST_DIMENSIONS = 5 };

/* A tensor as its tensormap describes it. Dimension 0 is contiguous. */
typedef struct {
    uint64_t base, strides[MOST_DIMENSIONS];
    uint32_t box[MOST_DIMENSIONS], sizes[MOST_DIMENSIONS];
    int rank, width; /* of an element, in bytes */
    int64_t swizzle, bytes; /* of the box */
} Tensor;

static uint32_t field(const uint8_t *map, int start, int n)
{
    uint32_t value;
    memcpy(&value, map + start + 4 * n, 4);
    return value;
}

/* The fields lie as `tensors.FIELDS` says. Return whether the tensor is one that TMA can copy. */
static int decode_tensor(Tensor *t, const uint8_t *map)
{
    static const uint8_t widths[12] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4};
    const uint32_t kind = field(map, 104, 0), mode = field(map, 112, 0);
    t->rank = (int)field(map, 8, 0) + 1;
    if (t->rank < 1 || t->rank > MOST_DIMENSIONS || kind >= 12 || mode > 3)
        return 0;
    if (kind == 11 || field(map, 108, 0) || field(map, 116, 0)) /* TF32, interleaved, or NaN */
        return 0;
    memcpy(&t->base, map, 8);
    t->width = widths[kind];
    t->swizzle = 16 << mode;
    t->bytes = t->width;
    for (int d = 0; d < t->rank; d++) {
        t->box[d] = field(map, 12, d);
        t->sizes[d] = field(map, 32, d);
        if (!d)
            t->strides[0] = (uint64_t)t->width;
        else
            memcpy(&t->strides[d], map + 72 + 8 * (d - 1), 8);
        if (field(map, 52, d) != 1 || !t->box[d] || t->box[d] > 256 || t->strides[d] >> 40 ||
            (d && t->strides[d] % 16))
            return 0;
        t->bytes *= t->box[d];
    }
    const int64_t of_row = (int64_t)t->box[0] * t->width;
    return t->base % 16 == 0 && of_row % 16 == 0 && (t->swizzle == 16 || of_row <= t->swizzle) &&
           t->bytes <= MOST_BOX_BYTES;
}

static int64_t swizzled(int64_t address, int64_t size)
{
    return address ^ (address >> 3 & (size - 16));
}

/* Find the parts of the box's rows that are inside of the tensor: runs of bytes in an allocation,
   and where they begin in the box. Return it, or null; `is_fault`: Python must say why. */
static Allocation *rows_of(Warp *w, const Tensor *t, const int64_t *corner, int *is_fault)
{
    Runner *r = w->runner;
    Allocation *place = 0;
    const int64_t last = (int64_t)t->sizes[0] - corner[0];
    const int64_t first = corner[0] < 0 ? -corner[0] : 0;
    const int64_t end = last < t->box[0] ? last : t->box[0];
    uint32_t index[MOST_DIMENSIONS] = {0};
    const int64_t of_row = (int64_t)t->box[0] * t->width;
    if (!r->box) { /* room for as many rows again, in their order */
        r->box = malloc(MOST_BOX_BYTES);
        r->runs = malloc(2 * (MOST_BOX_BYTES / 16) * sizeof *r->runs);
        if (!r->box || !r->runs)
            abort();
    }
    r->run_count = 0;
    *is_fault = 1;
    for (int64_t at = 0; at < t->bytes && first < end; at += of_row) {
        int is_inside = 1;
        int64_t address = (int64_t)t->base + (corner[0] + first) * t->width;
        for (int d = 1; d < t->rank; d++) {
            const int64_t position = corner[d] + index[d];
            is_inside &= position >= 0 && position < t->sizes[d];
            address += position * (int64_t)t->strides[d];
        }
        for (int d = 1; d < t->rank && ++index[d] == t->box[d]; d++)
            index[d] = 0;
        if (!is_inside)
            continue;
        const int64_t bytes = (end - first) * t->width;
        if (!place && !(place = find(w->spaces[0], (uint64_t)address)))
            return 0;
        if ((uint64_t)address < place->start || (uint64_t)(address + bytes) > place->end)
            return 0;
        const int64_t offset = address - (int64_t)place->base;
        if (offset % t->width)
            return 0;
        if (place->unit > t->width && (offset % place->unit || bytes % place->unit)) {
            w->coarse = place;
            w->finer = t->width;
            return 0;
        }
        r->runs[r->run_count++] = (Stretch){offset, bytes, at + first * t->width};
    }
    *is_fault = 0;
    return place;
}

static int by_offset(const void *a, const void *b)
{
    const Stretch *one = a, *other = b;
    return (one->offset > other->offset) - (one->offset < other->offset);
}

/* Count what a box takes of global memory: `Warp.count_copy`. */
static void count_rows(Warp *w, const Instruction *i, const Allocation *place)
{
    Runner *r = w->runner;
    uint8_t *touched = touched_by(i, place);
    int64_t *row = counts_of(w, i), sectors = 0, bytes = 0, all = 0, end = -1, last = -1;
    int is_ordered = 1;
    Stretch *runs = r->runs;
    for (int64_t n = 1; n < r->run_count; n++)
        is_ordered &= runs[n].offset >= runs[n - 1].offset;
    if (!is_ordered) {
        runs = r->runs + r->run_count;
        memcpy(runs, r->runs, (size_t)r->run_count * sizeof *runs);
        qsort(runs, (size_t)r->run_count, sizeof *runs, by_offset);
    }
    for (int64_t n = 0; n < r->run_count; n++) {
        const int64_t of_end = runs[n].offset + runs[n].bytes;
        const int64_t first = runs[n].offset > end ? runs[n].offset : end;
        all += runs[n].bytes;
        if (of_end <= end)
            continue;
        bytes += of_end - first;
        end = of_end;
        for (int64_t sector = first / 32; sector <= (of_end - 1) / 32; sector++) {
            sectors += sector > last;
            last = sector > last ? sector : last;
            if (touched)
                touched[sector] = 1;
        }
    }
    row[REQUESTS]++;
    row[BYTES] += all;
    row[SECTORS] += sectors;
    row[LEAST_SECTORS] += (bytes + 31) / 32;
}

static void count_units(const Warp *w, const Instruction *i, int64_t bytes)
{
    int64_t *row = counts_of(w, i);
    row[SHARED_REQUESTS]++;
    row[SHARED_BYTES] += bytes;
    row[WAVEFRONTS] += (bytes + 127) / 128;
    row[LEAST_WAVEFRONTS] += (bytes + 127) / 128;
}

/* A box, and where it lies: its rows in global memory are the runner's. */
typedef struct {
    Tensor tensor;
    Allocation *place, *shared; /* `place` is null if all of it is outside of the tensor */
    int64_t start; /* in shared memory */
} Box;

/* Whether this is a box without a fault. */
static int find_box(Warp *w, const Instruction *i, int lane, int32_t shared, int32_t map, Box *box)
{
    Access at;
    int64_t corner[MOST_DIMENSIONS];
    int is_fault;
    const Tensormap *found = known_map(w, map, i->second_offset, lane, &at);
    if (!found || found->acquired < 0 || knows(w, found->acquired) != 1)
        return 0;
    if (!decode_tensor(&box->tensor, at.place->data + at.least) || box->tensor.rank != i->mode)
        return 0;
    for (int d = 0; d < i->mode; d++)
        corner[d] = (int32_t)word_of(w, i->from[3 + d], lane);
    const int64_t swizzle = box->tensor.swizzle, align = swizzle > 16 ? 8 * swizzle : 128;
    if (!locate_at(w, shared, i->offset, w->spaces[1], 1u << lane, 16, LANES, &at))
        return 0;
    box->shared = at.place;
    box->start = at.least;
    const int64_t address = (int64_t)at.place->base + at.least;
    if (address % align || (uint64_t)(address + box->tensor.bytes) > at.place->end ||
        hits_barrier(at.place, at.least, at.least + box->tensor.bytes))
        return 0;
    box->place = rows_of(w, &box->tensor, corner, &is_fault);
    return !is_fault;
}

/* Where a unit of 16 bytes lies in shared memory. */
static int64_t unit_at(const Box *box, int64_t n)
{
    const int64_t base = (int64_t)box->shared->base;
    return swizzled(base + box->start + 16 * n, box->tensor.swizzle) - base;
}

/* Call a function of the units of shared memory for all of the box: at once, unless a swizzle
   leaves gaps. */
#define OF_UNITS(BOX, CALL)                                                                \
    do {                                                                                   \
        const int is_whole = (BOX)->tensor.bytes % (BOX)->tensor.swizzle == 0;             \
        const int64_t size = is_whole ? (BOX)->tensor.bytes : 16;                          \
        for (int64_t n_ = 0; 16 * n_ < (BOX)->tensor.bytes; n_ += size / 16) {             \
            const int64_t start_ = is_whole ? (BOX)->start : unit_at(BOX, n_);             \
            const int64_t first = start_ / (BOX)->shared->unit;                            \
            const int64_t end = (start_ + size) / (BOX)->shared->unit;                     \
            CALL;                                                                          \
        }                                                                                  \
    } while (0)

/* The same for its rows in global memory. */
#define OF_ROWS(RUNNER, PLACE, CALL)                                                       \
    for (int64_t n_ = 0; n_ < (RUNNER)->run_count; n_++) {                                 \
        const int64_t first = (RUNNER)->runs[n_].offset / (PLACE)->unit;                   \
        const int64_t end =                                                                \
            ((RUNNER)->runs[n_].offset + (RUNNER)->runs[n_].bytes) / (PLACE)->unit;        \
        CALL;                                                                              \
    }

/* The events of a bulk copy: when it reads, and, one later, when it writes. */
static int32_t begin_box(Warp *w, const Instruction *i, int32_t name, int32_t *agent)
{
    *agent = add_agent(w->runner, 0);
    const int32_t read = add_event(w, i->line, name, *agent, 1);
    add_event(w, i->line, name, *agent, 2);
    return read;
}

static int load_box(Warp *w, const Instruction *i, uint32_t mask)
{
    Runner *r = w->runner;
    Box box;
    int32_t agent;
    const int lane = first_lane(mask);
    const int32_t *fenced;
    if (w->events->count + 2 > w->events->capacity)
        return GROW;
    Mbarrier *one = is_single(mask) ? mbarrier_at(w, i->from[2], 0, lane) : 0;
    if (!one || !find_box(w, i, lane, i->from[0], i->from[1], &box))
        return PYTHON;
    const int32_t read = begin_box(w, i, w->load_box_name, &agent);
    fenced = r->fenced + (int64_t)w->index * r->capacity;
    OF_UNITS(&box, if (!may_write_units(w, box.shared, first, end)) return PYTHON);
    OF_ROWS(r, box.place, if (!may_read_units(w, box.place, first, end, fenced)) return PYTHON)
    OF_UNITS(&box, note_write_units(w, box.shared, first, end, read + 1));
    OF_ROWS(r, box.place, note_read_units(w, box.place, first, end, read))
    if (r->run_count)
        count_rows(w, i, box.place);
    count_units(w, i, box.tensor.bytes);
    memset(r->box, 0, (size_t)box.tensor.bytes);
    for (int64_t n = 0; n < r->run_count; n++)
        memcpy(r->box + r->runs[n].start, box.place->data + r->runs[n].offset,
               (size_t)r->runs[n].bytes);
    for (int64_t n = 0; 16 * n < box.tensor.bytes; n++)
        memcpy(box.shared->data + unit_at(&box, n), r->box + 16 * n, 16);
    one->has_parts = 1;
    ((int32_t *)part_of(r, one, TIMES))[agent] = 2;
    update_mbarrier(r, one, 0, -box.tensor.bytes);
    one->is_loading = 1;
    return BUDGET;
}

/* Whether a store writes the rest of 16 bytes behind a row of the tensor, where somebody has
   written: `tma._with_rest`. */
static int writes_rest(const Runner *r, const Box *box)
{
    const Tensor *t = &box->tensor;
    const int64_t of_box = (int64_t)t->box[0] * t->width;
    if ((int64_t)t->sizes[0] * t->width % 16 == 0)
        return 0;
    for (int64_t n = 0; n < r->run_count; n++) {
        const Stretch *one = &r->runs[n];
        const int64_t end = one->offset + one->bytes;
        const int64_t left = of_box - (one->start % of_box + one->bytes); /* of the box's row */
        int64_t rest = (16 - end % 16) % 16;
        if (left < rest)
            rest = left;
        for (int64_t at = end; at < end + rest; at += t->width)
            if (box->place->base + at + t->width <= box->place->end &&
                box->place->writes[at / box->place->unit] != UNWRITTEN)
                return 1;
    }
    return 0;
}

static int store_box(Warp *w, const Instruction *i, uint32_t mask)
{
    Runner *r = w->runner;
    State *s = &r->states[w->index];
    Box box;
    int32_t agent;
    const int lane = first_lane(mask);
    const int32_t *fenced;
    if (w->events->count + 2 > w->events->capacity)
        return GROW;
    if (!is_single(mask) || !find_box(w, i, lane, i->from[0], i->from[1], &box) ||
        writes_rest(r, &box))
        return PYTHON;
    const int32_t read = begin_box(w, i, w->store_box_name, &agent);
    fenced = r->fenced + (int64_t)w->index * r->capacity;
    OF_UNITS(&box, if (!may_read_units(w, box.shared, first, end, fenced)) return PYTHON);
    OF_ROWS(r, box.place, if (!may_write_units(w, box.place, first, end)) return PYTHON)
    OF_UNITS(&box, note_read_units(w, box.shared, first, end, read));
    OF_ROWS(r, box.place, note_write_units(w, box.place, first, end, read + 1))
    if (r->run_count)
        count_rows(w, i, box.place);
    count_units(w, i, box.tensor.bytes);
    for (int64_t n = 0; 16 * n < box.tensor.bytes; n++)
        memcpy(r->box + 16 * n, box.shared->data + unit_at(&box, n), 16);
    for (int64_t n = 0; n < r->run_count; n++) {
        uint8_t *where = box.place->data + r->runs[n].offset;
        keep(w, box.place, where, r->runs[n].bytes);
        memcpy(where, r->box + r->runs[n].start, (size_t)r->runs[n].bytes);
    }
    if (s->bulk_count == s->bulk_capacity) {
        s->bulk_capacity = 2 * s->bulk_capacity + 16;
        s->bulk = grown(s->bulk, s->bulk_capacity * (int64_t)sizeof *s->bulk);
    }
    s->bulk[s->bulk_count++] = (Bulk){lane, s->committed[lane], agent};
    return BUDGET;
}

/* Groups of bulk copies, which are a thread's. */

static void commit_bulk(State *s, uint32_t mask)
{
    for (int lane = 0; lane < LANES; lane++)
        s->committed[lane] += mask >> lane & 1;
}

static void wait_for_bulk(Warp *w, const Instruction *i, int lane)
{
    State *s = &w->runner->states[w->index];
    const int reads = i->mode, before = s->deleted[lane];
    int32_t done = s->committed[lane] - (int32_t)i->offset, in_flight = 0, any = 0, kept = 0;
    done = done > before ? done : before;
    for (int32_t n = 0, last = -1; n < s->bulk_count; n++) {
        const Bulk *one = &s->bulk[n];
        const int is_mine = one->lane == lane && one->group < s->committed[lane];
        any |= is_mine;
        in_flight += is_mine && one->group >= done && one->group != last;
        if (is_mine)
            last = one->group;
        const int is_done = is_mine && one->group < done, time = reads ? 1 : 2;
        if (is_done && w->times[one->agent] < time)
            w->times[one->agent] = time;
        if (!is_done || reads)
            s->bulk[kept++] = *one;
    }
    s->bulk_count = kept;
    if (!reads)
        s->deleted[lane] = done;
    if (any) {
        int64_t *row = counts_of(w, i);
        row[WAITS]++;
        row[IN_FLIGHT] += in_flight;
        row[MOST_IN_FLIGHT] = in_flight > row[MOST_IN_FLIGHT] ? in_flight : row[MOST_IN_FLIGHT];
    }
}

/* Blocks. */

static void begin_tensors(Runner *r)
{
    for (int n = 0; n < MOST_MBARRIERS; n++)
        r->mbarriers[n].is_live = r->mbarriers[n].is_loading = 0;
    tell_mbarriers(r);
    r->map_count_before = r->map_count;
    if (r->map_count)
        memcpy(r->maps_before, r->maps, (size_t)r->map_count * sizeof *r->maps);
    for (int n = 0; n < r->warp_count; n++) {
        State *s = &r->states[n];
        s->mbarrier = -1;
        s->bulk_count = 0;
        memset(s->committed, 0, sizeof s->committed);
        memset(s->deleted, 0, sizeof s->deleted);
    }
}

/* Whether a warp knows that an asynchronous operation has read its sources. */
static int is_known(const Runner *r, int32_t agent)
{
    for (int n = 0; n < r->warp_count; n++)
        if (r->times[(int64_t)n * r->capacity + agent])
            return 1;
    return 0;
}

/* Whether the mbarriers expect no more bytes, and all boxes have been waited for. */
static int may_end(const Runner *r)
{
    for (int n = 0; n < MOST_MBARRIERS; n++)
        if (r->mbarriers[n].is_loading || (r->mbarriers[n].is_live && r->mbarriers[n].bytes))
            return 0;
    for (int n = 0; n < r->warp_count; n++)
        for (int64_t k = 0; k < r->states[n].bulk_count; k++)
            if (!is_known(r, r->states[n].bulk[k].agent))
                return 0;
    return 1;
}

static void undo_maps(Runner *r)
{
    r->map_count = r->map_count_before;
    if (r->map_count)
        memcpy(r->maps, r->maps_before, (size_t)r->map_count * sizeof *r->maps);
}

static void free_tensors(Runner *r)
{
    for (int n = 0; n < MOST_MBARRIERS; n++)
        free(r->mbarriers[n].parts);
    for (int n = 0; n < r->warp_count; n++)
        free(r->states[n].bulk);
    free(r->maps);
    free(r->maps_before);
    free(r->box);
    free(r->runs);
}

static int of_tensors(Warp *w, const Instruction *i, uint32_t mask)
{
    switch (i->kind) {
    case MBARRIER_INIT: return mbarrier_init(w, i, mask);
    case MBARRIER_INVAL: return mbarrier_inval(w, i, mask);
    case MBARRIER_ARRIVE: return mbarrier_arrive(w, i, mask);
    case MBARRIER_WAIT: return mbarrier_wait(w, i);
    case LOAD_BOX: return load_box(w, i, mask);
    case STORE_BOX: return store_box(w, i, mask);
    case MAP_REPLACE: return replace_field(w, i, mask);
    case MAP_PUBLISH: return publish_map(w, i);
    case MAP_ACQUIRE: return acquire_map(w, i, mask);
    case BULK_COMMIT: commit_bulk(&w->runner->states[w->index], mask); return BUDGET;
    default:
        for (int lane = 0; lane < LANES; lane++)
            if (mask >> lane & 1)
                wait_for_bulk(w, i, lane);
        return BUDGET;
    }
}
