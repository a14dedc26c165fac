/* SPDX-License-Identifier: MIT
 *
 * Whole blocks, one after the other: the warps in their order, the barriers at which they meet, and
 * asynchronous operations that complete when they are issued. This is what `machine.Block.turns`
 * does under the first schedule.
 *
 * A block is executed entirely or not at all. If an instruction is left to Python, what the block
 * has done to global memory is undone, and Python executes the block from its beginning. So all
 * faults are found and named by Python.
 */

#include "tma.c"

/* Groups. */

static Operation *add_operation(Family *f)
{
    if (f->count == f->operation_capacity) {
        f->operation_capacity = 2 * f->operation_capacity + 16;
        f->operations = realloc(f->operations, sizeof *f->operations * (size_t)f->operation_capacity);
        if (!f->operations)
            abort();
    }
    return &f->operations[f->count++];
}

static void commit(Family *f)
{
    if (f->groups == f->group_capacity) {
        f->group_capacity = 2 * f->group_capacity + 16;
        f->ends = realloc(f->ends, sizeof *f->ends * (size_t)f->group_capacity);
        if (!f->ends)
            abort();
    }
    f->ends[f->groups++] = f->count;
}

static Copies *begin_copies(Warp *w)
{
    Runner *r = w->runner;
    State *s = &r->states[w->index];
    Operation *one = add_operation(&s->families[OF_COPIES]);
    one->agent = add_agent(r, r->copies_need_fence);
    one->product = 0;
    s->copies.agent = one->agent;
    s->copies.name = s->copy_name;
    s->copies.time = 0;
    s->copies.count = 0;
    s->copies.done = 2;
    return w->copies = &s->copies;
}

/* A product has been waited for: its sums are in their registers, if no later one writes them. */
static int end_product(Warp *w, State *s, int32_t number, const Instruction *i)
{
    int is_last = 1;
    for (int n = 0; n < i->results; n++) {
        const int32_t to = i->table[n];
        if (w->states[to] != PENDING)
            return PYTHON;
        is_last &= s->owners[to] == number;
    }
    for (int n = 0; n < i->results && is_last; n++) {
        w->states[i->table[n]] = IN_ROW;
        w->versions[i->table[n]]++;
    }
    return BUDGET;
}

/* Wait for the operations of a family up to an end. */
static int wait_up_to(Warp *w, Family *f, int32_t end)
{
    State *s = &w->runner->states[w->index];
    for (; f->first < end; f->first++) {
        const Operation *one = &f->operations[f->first];
        w->times[one->agent] = 2;
        if (one->product && end_product(w, s, f->first, one->product) == PYTHON)
            return PYTHON;
    }
    return BUDGET;
}

/* `tensor_cores.Wgmma.wait_early`: an instruction reads a sum of a product. */
static int wait_early(Warp *w, int32_t sum)
{
    State *s = &w->runner->states[w->index];
    return wait_up_to(w, &s->families[OF_PRODUCTS], s->owners[sum] + 1) == BUDGET;
}

static int wait_for(Warp *w, const Instruction *i)
{
    State *s = &w->runner->states[w->index];
    Family *f = &s->families[i->mode];
    const int32_t left = f->groups - (int32_t)i->offset;
    int32_t start = f->first, has_any = 0, in_flight = 0;
    for (int32_t g = f->first_group; g < f->groups; g++) {
        const int is_any = f->ends[g] > start;
        has_any |= is_any;
        in_flight += is_any && g >= left;
        start = is_any ? f->ends[g] : start;
    }
    if (has_any) {
        int64_t *row = counts_of(w, i);
        row[WAITS]++;
        row[IN_FLIGHT] += in_flight;
        row[MOST_IN_FLIGHT] = in_flight > row[MOST_IN_FLIGHT] ? in_flight : row[MOST_IN_FLIGHT];
    }
    for (; f->first_group < left; f->first_group++)
        if (wait_up_to(w, f, f->ends[f->first_group]) == PYTHON)
            return PYTHON;
    return BUDGET;
}

/* `knowledge.share`, when all warps of a barrier have arrived. */
static void share(Runner *r, const int32_t *warps, int32_t count)
{
    int32_t *both[2] = {r->times, r->fenced};
    for (int k = 0; k < 2; k++) {
        int32_t *first = both[k] + (int64_t)warps[0] * r->capacity;
        for (int n = 1; n < count; n++) {
            const int32_t *mine = both[k] + (int64_t)warps[n] * r->capacity;
            for (int32_t a = 0; a < r->agents; a++)
                first[a] = mine[a] > first[a] ? mine[a] : first[a];
        }
        for (int n = 1; n < count; n++)
            memcpy(both[k] + (int64_t)warps[n] * r->capacity, first, 4 * (size_t)r->agents);
    }
    Known *foreign = 0;
    for (int n = 0; n < count; n++)
        foreign = merge(&r->releases, foreign, r->warps[warps[n]].foreign);
    for (int n = 0; n < count; n++) {
        r->warps[warps[n]].foreign = foreign;
        r->warps[warps[n]].times[warps[n]]++;
    }
}

/* `control._reduce_at_barrier`: give each warp the result of all votes. */
static void end_votes(Runner *r, const Instruction *i, int32_t number, int32_t expected)
{
    uint32_t counts[LANES];
    uint8_t results[LANES];
    const int32_t votes = r->votes[number];
    for (int n = 0; n < LANES; n++) {
        counts[n] = (uint32_t)votes;
        results[n] = i->count == 2 ? votes == r->voters[number] : votes != 0;
    }
    for (int n = 0; n < expected; n++) {
        Warp *one = &r->warps[r->arrivals[number][n]];
        put(one, i->to[0], i->count == 1 ? (void *)counts : (void *)results, one->alive);
    }
    r->votes[number] = r->voters[number] = 0;
}

static int arrive(Warp *w, const Instruction *i)
{
    Runner *r = w->runner;
    const int32_t number = i->mode, expected = i->offset ? (int32_t)i->offset : r->warp_count;
    if (number >= BARRIERS)
        return PYTHON;
    if (w->of_threads) {
        if (w->alive != w->first_alive)
            return PYTHON; /* threads have ended before */
        for (int n = 0; n < r->warp_count && !i->offset; n++)
            if (r->states[n].done)
                return PYTHON;
        if (r->arrived[number] && !i->offset &&
            r->warps[r->arrivals[number][0]].pc != w->pc + 1)
            return PYTHON; /* in a branch that not all threads take */
        if (i->count) {
            r->votes[number] += __builtin_popcount(bits_of(row(w, i->from[0])) & w->alive);
            r->voters[number] += __builtin_popcount(w->alive);
        }
    }
    r->arrivals[number][r->arrived[number]++] = w->index;
    r->states[w->index].waiting = 1;
    if (r->arrived[number] < expected)
        return STOPPED;
    share(r, r->arrivals[number], expected);
    if (i->count)
        end_votes(r, i, number, expected);
    for (int n = 0; n < expected; n++)
        r->states[r->arrivals[number][n]].waiting = 0;
    r->arrived[number] = 0;
    return STOPPED;
}

/* wgmma, of the 16 rows that a warp has: D = A·B + D, or A·B. */

/* The addresses of an operand's units of 16 bytes: `tensor_cores._chunks`. */
static int64_t chunks(uint64_t bits, int first, int rows, int by_rows, int64_t *to)
{
    const int64_t start = (int64_t)(bits & 0x3FFF) << 4;
    const int64_t leading = (int64_t)(bits >> 16 & 0x3FFF) << 4;
    const int64_t stride = (int64_t)(bits >> 32 & 0x3FFF) << 4;
    const int mode = (int)(bits >> 62);
    const uint64_t unknown = (uint64_t)3 << 14 | (uint64_t)3 << 30 | (uint64_t)0xFFFE << 46;
    if ((bits & unknown) || !mode)
        return 0;
    const int64_t size = 256 >> mode;
    int64_t count = 0;
    if (by_rows)
        for (int64_t row = first; row < first + rows; row++)
            for (int chunk = 0; chunk < 2; chunk++) {
                const int64_t at = start + row / 8 * stride + row % 8 * size + 16 * chunk;
                to[count++] = at ^ (at >> 3 & (size - 16));
            }
    else
        for (int64_t row = first; row < first + rows; row += 8)
            for (int64_t column = 0; column < 16; column++) {
                int64_t at = start + 2 * row / size * leading + 2 * row % size;
                at += column / 8 * stride + column % 8 * size;
                to[count++] = at ^ (at >> 3 & (size - 16));
            }
    return count;
}

static int take_matrix(Warp *w, int32_t descriptor, int first, int rows, int by_rows, int kind,
                       int32_t event, double *to)
{
    const uint64_t *bits = (void *)row(w, descriptor);
    int64_t addresses[512];
    for (int n = 1; n < LANES; n++)
        if (bits[n] != bits[0])
            return 0;
    const int64_t count = chunks(bits[0], first, rows, by_rows, addresses);
    const int32_t *fenced = w->runner->fenced + (int64_t)w->index * w->runner->capacity;
    return count && read_many(w, w->spaces[1], addresses, count, 16, event, fenced) &&
           decode_matrix(to, w->spaces[1], addresses, rows, by_rows, kind);
}

/* The same of A in registers, of which each has 4 bytes of a thread. */
static void take_registers(Warp *w, const int32_t *registers, int kind, double *to)
{
    uint8_t bytes[16][32];
    for (int n = 0; n < LANES; n++)
        for (int k = 0; k < 4; k++)
            memcpy(bytes[n / 4 + k % 2 * 8] + n % 4 * 4 + k / 2 * 16, row(w, registers[k]) + 4 * n,
                   4);
    const int of_chunk = 16 / bytes_of(kind);
    for (int n = 0; n < 32; n++) {
        float found[16];
        numbers(found, bytes[0] + 16 * n, kind);
        for (int k = 0; k < of_chunk; k++)
            to[n * of_chunk + k] = found[k];
    }
}

typedef double Four __attribute__((vector_size(32)));

static inline Four load_four(const double *from)
{
    Four found;
    memcpy(&found, from, sizeof found);
    return found;
}

/* The products of 4 rows of A and 8 columns of B, of which those of a row lie side by side. Eight
   sums do not wait for each other. */
static inline void multiply(double (*to)[256], const double *a, const double *b, int depth)
{
    Four left[4], right[4], l0 = {0}, l1 = {0}, l2 = {0}, l3 = {0};
    Four r0 = {0}, r1 = {0}, r2 = {0}, r3 = {0};
    for (int k = 0; k < depth; k++) {
        const Four l = load_four(b + 256 * k), r = load_four(b + 256 * k + 4);
        l0 += a[k] * l, r0 += a[k] * r;
        l1 += a[depth + k] * l, r1 += a[depth + k] * r;
        l2 += a[2 * depth + k] * l, r2 += a[2 * depth + k] * r;
        l3 += a[3 * depth + k] * l, r3 += a[3 * depth + k] * r;
    }
    left[0] = l0, left[1] = l1, left[2] = l2, left[3] = l3;
    right[0] = r0, right[1] = r1, right[2] = r2, right[3] = r3;
    for (int m = 0; m < 4; m++) {
        memcpy(to[m], &left[m], sizeof left[m]);
        memcpy(to[m] + 4, &right[m], sizeof right[m]);
    }
}

/* `tensor_cores.add`: the n-th register of D has two columns of 8 rows; sums of integers wrap. */
static void add_to_sums(uint8_t *held, double (*products)[256], int n, int adds, int is_integer)
{
    int32_t *whole = (int32_t *)held;
    float *real = (float *)held;
    for (int m = 0; m < 8; m++) {
        const double *from = products[n / 2 % 2 * 8 + m] + n / 4 * 8 + n % 2;
        for (int k = 0; k < 4; k++)
            if (is_integer)
                whole[4 * m + k] =
                    (int32_t)((int64_t)from[2 * k] + (adds ? whole[4 * m + k] : 0));
            else
                real[4 * m + k] = (float)(from[2 * k] + (adds ? real[4 * m + k] : 0.0f));
    }
}

static int async_product(Warp *w, const Instruction *i)
{
    Runner *r = w->runner;
    State *s = &r->states[w->index];
    const int columns = i->results * 2, depth = 32 / bytes_of(i->mode);
    const int32_t *to = i->table, *of_a = i->table + i->results;
    if (w->events->count + 2 > w->events->capacity)
        return GROW;
    if (!s->has_fence)
        return PYTHON;
    const int adds = *row(w, i->from[0]);
    int pending = 0;
    for (int n = 0; n < i->results; n++) {
        pending += w->states[to[n]] == PENDING;
        if (adds && w->states[to[n]] != PENDING &&
            (!in_row(w, to[n]) || w->versions[to[n]] != s->fence_versions[to[n]]))
            return PYTHON;
        if (w->states[to[n]] == PENDING && s->owners[to[n]] != s->owners[to[0]])
            return PYTHON;
    }
    if (pending && pending != i->results)
        return PYTHON;
    for (int n = 0; n < i->second_offset; n++) /* registers of A */
        if (!in_row(w, of_a[n]) || w->versions[of_a[n]] != s->fence_versions[of_a[n]])
            return PYTHON;
    Family *f = &s->families[OF_PRODUCTS];
    const int32_t number = f->count;
    Operation *one = add_operation(f);
    one->agent = add_agent(r, 0);
    one->product = i;
    const int32_t read = add_event(w, i->line, s->product_name, one->agent, 1);
    add_event(w, i->line, s->product_name, one->agent, 2);
    double a[16 * 32], b[256 * 32], transposed[32][256], sums[16][256];
    if (!take_matrix(w, i->from[1], 0, columns, !(i->transposed & 2), i->width, read, b))
        return PYTHON;
    if (i->second_offset)
        take_registers(w, of_a, i->mode, a);
    else if (!take_matrix(w, i->from[2], 16 * (w->index % 4), 16, !(i->transposed & 1), i->mode,
                          read, a))
        return PYTHON;
    for (int n = 0; n < columns; n++)
        for (int k = 0; k < depth; k++)
            transposed[k][n] = b[n * depth + k];
    for (int m = 0; m < 16; m += 4)
        for (int n = 0; n < columns; n += 8)
            multiply((double(*)[256])(sums[m] + n), a + m * depth, transposed[0] + n, depth);
    for (int n = 0; n < i->results; n++)
        add_to_sums(row(w, to[n]), sums, n, adds, i->is_signed);
    for (int n = 0; n < i->results; n++) {
        w->states[to[n]] = PENDING;
        w->versions[to[n]]++;
        s->owners[to[n]] = number;
    }
    return BUDGET;
}

static int of_block(Warp *w, const Instruction *i, uint32_t mask)
{
    Runner *r = w->runner;
    State *s = &r->states[w->index];
    switch (i->kind) {
    case RETURN:
        for (int n = 0; w->of_threads && n < BARRIERS; n++)
            if (r->arrived[n])
                return PYTHON; /* others wait for its threads */
        s->done = 1;
        return STOPPED;
    case BARRIER: return arrive(w, i);
    case COMMIT:
        commit(&s->families[i->mode]);
        if (i->mode == OF_COPIES)
            w->copies = 0;
        return BUDGET;
    case WAIT: return wait_for(w, i);
    case PROXY_FENCE: {
        int32_t *fenced = r->fenced + (int64_t)w->index * r->capacity;
        for (int32_t a = 0; a < r->agents; a++)
            fenced[a] = w->times[a] > fenced[a] ? w->times[a] : fenced[a];
        return BUDGET;
    }
    case PRODUCT_FENCE:
        memcpy(s->fence_versions, w->versions, 4 * (size_t)r->rows);
        s->has_fence = 1;
        w->fence = s->fence_versions;
        return BUDGET;
    case ASYNC_PRODUCT: return async_product(w, i);
    case ATOMIC: return atomic(w, i, mask);
    case GRID_WAIT:
        acquire(w, WAIT_ADDRESS);
        s->has_waited = 1;
        r->controls[w->block] |= WAITED;
        return BUDGET;
    case GRID_TRIGGER:
        r->controls[w->block] |= s->has_waited ? TRIGGERED : TRIGGERED | EARLY;
        return BUDGET;
    default: return of_tensors(w, i, mask);
    }
}

/* Blocks. */

/* Let nobody have written memory of a block. */
static void forget(Allocation *place)
{
    const int64_t bytes = (int64_t)(place->end - place->base + 127) / 128 * 128;
    if (!bytes)
        return;
    memset(place->data, 0xFF, (size_t)bytes); /* memory.POISON */
    for (int64_t n = 0; n < bytes / place->unit; n++)
        place->writes[n] = UNWRITTEN;
    memset(place->reads, 0, (size_t)(bytes / place->unit) * 4);
    memset(place->others, 0, (size_t)(bytes / place->unit) * 4);
}

static void begin_block(Runner *r, const int32_t *position, int32_t number)
{
    r->agents = r->warp_count;
    if (!r->capacity) {
        r->capacity = 64;
        while (r->capacity < r->warp_count)
            r->capacity *= 2;
        r->times = calloc((size_t)r->warp_count * r->capacity, 4);
        r->fenced = calloc((size_t)r->warp_count * r->capacity, 4);
        if (!r->times || !r->fenced)
            abort();
        set_knowledge(r);
    } else {
        memset(r->times, 0, (size_t)r->warp_count * r->capacity * 4);
        memset(r->fenced, 0, (size_t)r->warp_count * r->capacity * 4);
    }
    memset(r->arrived, 0, sizeof r->arrived);
    r->undo.used = 0;
    tidy_releases(&r->releases);
    begin_atomics(r);
    begin_tensors(r);
    r->undo.first_event = r->events->count;
    memset(r->votes, 0, sizeof r->votes);
    memset(r->voters, 0, sizeof r->voters);
    for (int k = 1; k < 3; k++) { /* shared memory, and stacks of threads */
        const Space *space = r->warps[0].spaces[k];
        for (int64_t n = 0; n < space->count; n++)
            forget(space->allocations[n]);
    }
    for (int n = 0; n < r->warp_count; n++) {
        Warp *w = &r->warps[n];
        State *s = &r->states[n];
        w->times[n] = 1;
        memcpy(w->states, r->template_states, (size_t)r->rows);
        for (int k = 0; k < r->coordinate_count; k++) {
            const Coordinate *one = &r->coordinates[k];
            const int64_t value = position[one->axis];
            for (int lane = 0; lane < LANES; lane++)
                memcpy(row(w, one->row) + lane * one->width, &value, (size_t)one->width);
        }
        w->pc = w->count = w->stores = 0;
        w->block = number;
        w->active = w->alive = w->first_alive;
        w->group_count = w->held = 0;
        w->patience = PATIENCE;
        w->copies = 0;
        w->fence = 0;
        w->foreign = 0;
        w->coarse = 0;
        s->has_fence = s->done = s->waiting = s->has_waited = 0;
        for (int k = 0; k < 2; k++)
            s->families[k].count = s->families[k].groups = s->families[k].first_group =
                s->families[k].first = 0;
    }
}

static int is_ready(const Runner *r, const State *s)
{
    if (!s->waiting)
        return 1;
    return s->mbarrier >= 0 && has_ended(&r->mbarriers[s->mbarrier], s->parity);
}

static int run_block(Runner *r)
{
    for (;;) {
        Warp *next = 0;
        int is_done = 1;
        for (int n = 0; n < r->warp_count && !next; n++) {
            is_done &= r->states[n].done;
            if (!r->states[n].done && is_ready(r, &r->states[n]))
                next = &r->warps[n];
        }
        if (!next) {
            r->fault_pc = -1;
            return is_done && may_end(r) ? BUDGET : PYTHON; /* or a deadlock */
        }
        r->states[next->index].waiting = 0;
        r->states[next->index].mbarrier = -1;
        const int64_t budget = r->limit - next->count;
        const int why =
            next->of_threads ? run_threads(next, budget) : run(next, budget, INT32_MAX);
        r->fault_pc = next->pc;
        if (why == GROW)
            return GROW;
        if (why == PYTHON && next->coarse && next->coarse->touched) {
            r->coarse = next->coarse;
            r->finer = next->finer;
            return REFINE;
        }
        if (why != STOPPED)
            return PYTHON; /* or an endless loop */
    }
}

static void undo(Runner *r)
{
    /* The last change first: a place may have been changed several times. */
    int64_t starts = 0, used = r->undo.used;
    int64_t *found = malloc((size_t)(used / 24 + 1) * 8);
    if (!found)
        abort();
    for (int64_t at = 0; at < used;) {
        int64_t size;
        memcpy(&size, r->undo.bytes + at + 8, 8);
        found[starts++] = at;
        at += 16 + ((size + 7) & ~7);
    }
    while (starts-- > 0) {
        const uint8_t *from = r->undo.bytes + found[starts];
        void *where;
        int64_t size;
        memcpy(&where, from, 8);
        memcpy(&size, from + 8, 8);
        memcpy(where, from + 16, (size_t)size);
    }
    free(found);
}

/* Execute blocks at `positions` until one is left to Python, the events need more room, or a shadow
   must be finer.
   Return how many have ended. */
int64_t run_blocks(Runner *r, const int32_t *positions, int64_t count, int32_t number, int *why)
{
    *why = BUDGET;
    for (int64_t n = 0; n < count; n++) {
        const int64_t events = r->events->count;
        begin_block(r, positions + 3 * n, number + (int32_t)n);
        *why = run_block(r);
        if (*why != BUDGET) {
            undo(r);
            undo_releases(&r->releases);
            undo_maps(r);
            r->events->count = events;
            if (r->controls)
                r->controls[number + n] = 0;
            memset(r->counts, 0, (size_t)r->count_size * 8);
            return n;
        }
        for (int64_t k = 0; k < r->count_size; k += COLUMNS) {
            int64_t *to = r->total_counts + k, *from = r->counts + k;
            if (!from[EXECUTIONS])
                continue;
            for (int c = 0; c < MOST_IN_FLIGHT; c++)
                to[c] += from[c];
            if (from[MOST_IN_FLIGHT] > to[MOST_IN_FLIGHT])
                to[MOST_IN_FLIGHT] = from[MOST_IN_FLIGHT];
            memset(from, 0, COLUMNS * 8);
        }
        for (int k = 0; k < r->warp_count; k++) {
            r->executed += r->warps[k].count;
            r->stores += r->warps[k].stores;
        }
    }
    return count;
}

void free_runner(Runner *r)
{
    for (int n = 0; n < r->warp_count; n++) {
        for (int k = 0; k < 2; k++) {
            free(r->states[n].families[k].operations);
            free(r->states[n].families[k].ends);
        }
        free_copies(&r->states[n].copies);
    }
    free(r->times);
    free(r->fenced);
    free(r->undo.bytes);
    free(r->found);
    free_releases(&r->releases);
    free_tensors(r);
}
