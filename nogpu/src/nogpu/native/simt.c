/* SPDX-License-Identifier: MIT
 *
 * Warps of CUDA C++, whose threads take different ways: what `machine.simt` does in Python. Groups
 * of threads that are at one place have a mask; the group with the smallest program counter runs
 * first.
 */

#include "definedness.c"

#define PATIENCE 4096 /* `simt.PATIENCE` and `simt.HELD` */
#define HELD 512
#define LOCAL_ADDRESS ((uint64_t)1 << 57) /* `block.LOCAL_BASE` */
#define END_OF_SHARED ((uint64_t)1 << 24)

static void add_group(Warp *w, int32_t pc, uint32_t mask, int32_t waits)
{
    for (int n = 0; n < w->group_count; n++)
        if (w->groups[n].pc == pc && w->groups[n].waits == waits) {
            w->groups[n].mask |= mask;
            return;
        }
    Group *one = &w->groups[w->group_count++];
    one->pc = pc;
    one->mask = mask;
    one->waits = waits;
}

static void remove_group(Warp *w, int n) { w->groups[n] = w->groups[--w->group_count]; }

/* Let the active threads wait for those that execute the instruction with them. Return 1 if those
   are here, 0 if somebody waits, and -1 if Python must say what is wrong. */
static int converge(Warp *w, const Instruction *i)
{
    uint32_t here = w->active, ready = 0;
    int found = -1;
    if (i->members < 0 && here == w->alive)
        return 1;
    for (int n = 0; n < w->group_count; n++)
        if (w->groups[n].waits && w->groups[n].pc == w->pc)
            found = n;
    if (found >= 0)
        here |= w->groups[found].mask;
    if (i->members < 0)
        ready = here == w->alive ? here : 0;
    else {
        if (!in_row(w, i->members))
            return -1;
        const uint32_t *named = (void *)row(w, i->members);
        for (int n = 0; n < LANES; n++)
            if (here >> n & 1 && !(named[n] >> n & 1))
                return -1;
        for (int n = 0; n < LANES && !ready; n++) {
            if (!(here >> n & 1) || named[n] & w->alive & ~here)
                continue;
            uint32_t group = 0;
            for (int k = 0; k < LANES; k++)
                group |= (uint32_t)(here >> k & 1 && named[k] == named[n]) << k;
            ready = named[n] & w->alive & ~group ? 0 : group;
        }
    }
    if (found >= 0)
        remove_group(w, found);
    if (here & ~ready)
        add_group(w, w->pc, here & ~ready, 1);
    w->active = ready;
    return ready != 0;
}

/* Let the group with the smallest program counter be the active one. Return 0 if all threads wait,
   1 if it has to wait for others itself first, and 2 if it has found those. */
static int choose(Warp *w)
{
    int least = -1, most = -1;
    for (int n = 0; n < w->group_count; n++) {
        if (w->groups[n].waits)
            continue;
        if (least < 0 || w->groups[n].pc < w->groups[least].pc)
            least = n;
        if (most < 0 || w->groups[n].pc > w->groups[most].pc)
            most = n;
    }
    if (least >= 0) {
        if (w->active) {
            if (w->pc < w->groups[least].pc && w->patience > 0)
                return 1;
            add_group(w, w->pc, w->active, 0);
            w->active = 0;
            return choose(w);
        }
        if (w->patience <= 0) {
            least = most;
            w->patience = PATIENCE;
            w->held = HELD;
        }
        w->pc = w->groups[least].pc;
        w->active = w->groups[least].mask;
        remove_group(w, least);
        return 1;
    }
    if (w->active)
        return 1;
    for (int n = 0; n < w->group_count; n++) {
        w->pc = w->groups[n].pc;
        const int found = converge(w, &w->program[w->pc]);
        if (found < 0)
            return 0;
        if (found)
            return 2;
    }
    return 0;
}

/* The smallest program counter of a group that waits for nothing. */
static int32_t least_of_others(const Warp *w)
{
    int32_t least = INT32_MAX;
    for (int n = 0; n < w->group_count; n++)
        if (!w->groups[n].waits && w->groups[n].pc < least)
            least = w->groups[n].pc;
    return least;
}

/* The space of generic addresses; 3 if they are in several. */
static int generic_space(const Warp *w, const Instruction *i, uint32_t mask)
{
    const uint64_t *held = (void *)row(w, i->from[0]);
    int found = -1;
    if (w->widths[i->from[0]] != 8)
        return 3;
    for (int n = 0; n < LANES; n++) {
        if (!(mask >> n & 1))
            continue;
        const uint64_t address = held[n] + (uint64_t)i->offset;
        const int one = address >= LOCAL_ADDRESS ? 2 : address < END_OF_SHARED ? 1 : 0;
        if (found >= 0 && found != one)
            return 3;
        found = one;
    }
    return found;
}

/* A load or a store. Threads may access several allocations: where a block is executed as a whole,
   they do so one after the other. */
static int access_memory(Warp *w, const Instruction *i, uint32_t mask)
{
    int (*const function)(Warp *, const Instruction *, uint32_t) = i->kind == LOAD ? load : store;
    w->generic = i->space == GENERIC ? generic_space(w, i, mask) : i->space;
    if (w->generic != GENERIC) {
        const int whole = function(w, i, mask);
        if (whole != PYTHON || !w->runner || w->coarse)
            return whole;
    } else if (!w->runner)
        return PYTHON;
    if (w->widths[i->from[0]] != 8)
        return PYTHON;
    if (w->events->count + LANES > w->events->capacity)
        return GROW;
    const uint64_t *held = (void *)row(w, i->from[0]);
    for (uint32_t left = mask; left;) {
        const uint32_t first = left & -left;
        w->generic = i->space == GENERIC ? generic_space(w, i, first) : i->space;
        const Allocation *place =
            find(w->spaces[w->generic], held[__builtin_ctz(left)] + (uint64_t)i->offset);
        uint32_t here = 0;
        for (int n = 0; place && n < LANES; n++) {
            const uint64_t address = held[n] + (uint64_t)i->offset;
            here |= (uint32_t)(left >> n & 1 && place->start <= address && address < place->end)
                    << n;
        }
        if (!here || here == mask || function(w, i, here) != BUDGET)
            return PYTHON;
        if (w->generic == 0 && here != mask && left != mask)
            w->counts[COLUMNS * w->pc + REQUESTS]--; /* one request */
        left &= ~here;
    }
    return BUDGET;
}

static void vote(Warp *w, const Instruction *i, uint32_t mask)
{
    const uint32_t votes = bits_of(row(w, i->from[0])) & mask;
    uint32_t ballots[LANES];
    uint8_t results[LANES];
    const int outcome = i->mode == 0   ? votes == mask
                        : i->mode == 1 ? votes != 0
                                       : votes == mask || votes == 0;
    for (int n = 0; n < LANES; n++) {
        ballots[n] = votes;
        results[n] = (uint8_t)outcome;
    }
    put(w, i->to[0], i->mode == 3 ? (void *)ballots : (void *)results, mask);
}

static void match_any(Warp *w, const Instruction *i, uint32_t mask)
{
    const int width = w->widths[i->from[0]];
    const uint8_t *values = row(w, i->from[0]);
    uint32_t same[LANES] = {0};
    for (int n = 0; n < LANES; n++)
        for (int k = 0; k < LANES; k++)
            same[n] |= (uint32_t)(mask >> k & 1 && !memcmp(values + n * width, values + k * width,
                                                           (size_t)width))
                       << k;
    put(w, i->to[0], same, mask);
}

static void active_mask(Warp *w, const Instruction *i, uint32_t mask)
{
    uint32_t active[LANES];
    for (int n = 0; n < LANES; n++)
        active[n] = w->active;
    put(w, i->to[0], active, mask);
}

static void branch(Warp *w, const Instruction *i, uint32_t mask)
{
    const uint32_t others = w->active & ~mask;
    if (others)
        add_group(w, w->pc + 1, others, 0);
    if (i->target <= w->pc && w->group_count)
        w->patience--;
    w->pc = i->target;
    w->active = mask;
    if (w->program[i->target].kind == RETURN)
        w->early |= mask;
}

static int branch_by_index(Warp *w, const Instruction *i, uint32_t mask)
{
    const uint32_t *index = (void *)row(w, i->from[0]), others = w->active & ~mask;
    for (int n = 0; n < LANES; n++)
        if (mask >> n & 1 && index[n] >= (uint64_t)i->second_offset)
            return PYTHON;
    if (others)
        add_group(w, w->pc + 1, others, 0);
    for (int n = 0; n < LANES; n++)
        if (mask >> n & 1)
            add_group(w, i->table[index[n]], 1u << n, 0);
    w->active = 0;
    return BUDGET;
}

/* Execute at most `budget` instructions. Return why it stopped. */
int run_threads(Warp *w, int64_t budget)
{
    Bits undefined;
    int has_found = 0;
    int32_t limit = w->held > 0 ? INT32_MAX : least_of_others(w);
    for (; budget > 0; budget--) {
        if (w->held > 0) {
            if (--w->held == 0)
                limit = least_of_others(w);
        }
        if (!w->active || w->pc >= limit || w->patience <= 0) {
            if (w->held > 0 && w->active)
                w->patience = PATIENCE;
            else {
                w->held = 0;
                const int chosen = choose(w);
                if (!chosen)
                    return PYTHON;
                has_found = chosen == 2;
                limit = w->held > 0 ? INT32_MAX : least_of_others(w);
            }
        }
        const int32_t pc = w->pc;
        const Instruction *i = &w->program[pc];
        uint32_t mask = w->active;
        if (w->undo && w->undo->used > MOST_UNDONE)
            return PYTHON;
        if (i->kind == LEFT || (i->kind >= RETURN && !w->runner))
            return PYTHON;
        if (i->guard >= 0) {
            if (!in_row(w, i->guard))
                return PYTHON;
            const uint32_t bits = bits_of(row(w, i->guard));
            mask &= i->negated ? ~bits : bits;
            if (!mask) {
                w->pc++;
                w->count++;
                continue;
            }
            if (i->whole && mask != w->active) {
                add_group(w, pc + 1, w->active & ~mask, 0);
                w->active = mask;
                limit = least_of_others(w);
            }
        }
        int is_defined = 1;
        for (int n = 0; n < i->sources; n++)
            is_defined &= in_row(w, i->from[n]);
        if (mask != ALL)
            for (int n = 0; n < i->results; n++)
                if (i->to[n] >= 0 && !in_row(w, i->to[n]) && !may_be_kept(w, i, n))
                    return PYTHON;
        if (w->events->count == w->events->capacity)
            return GROW;
        if (i->whole && !has_found) {
            const int found = converge(w, i);
            if (found < 0)
                return PYTHON;
            if (!found)
                continue;
            mask = w->active;
        }
        if (i->whole && i->members < 0 && mask != ALL && i->kind != BARRIER)
            return PYTHON; /* such as products of matrices, which it refuses */
        has_found = 0;
        if (!is_defined && !find_bits(w, i, mask, &undefined))
            return PYTHON;
        int left = BUDGET;
        w->generic = i->space;
        switch (i->kind) {
        case ELEMENTWISE: elementwise(w, i, mask); break;
        case PACK: pack(w, i, mask); break;
        case SHUFFLE: left = shuffle(w, i, mask); break;
        case LOAD:
        case STORE:
            left = access_memory(w, i, mask);
            break;
        case LOAD_MATRIX: left = load_matrix(w, i); break;
        case STORE_MATRIX: left = store_matrix(w, i); break;
        case REDUCE: reduce(w, i, mask); break;
        case VOTE: vote(w, i, mask); break;
        case MATCH: match_any(w, i, mask); break;
        case ACTIVE: active_mask(w, i, mask); break;
        case PRODUCT: product(w, i); break;
        case COPY: left = copy(w, i, mask); break;
        case NOTHING: break;
        case SYNC_WARP: w->times[w->index]++; break;
        case BRANCH:
            branch(w, i, mask);
            limit = w->held > 0 ? INT32_MAX : least_of_others(w);
            w->pc--;
            break;
        case BRANCH_INDEX:
            left = branch_by_index(w, i, mask);
            w->pc--;
            break;
        case RETURN:
            w->alive &= ~mask;
            w->active &= ~mask;
            if (!w->alive)
                left = of_block(w, i, mask);
            break;
        case ATOMIC:
            if (i->space == GENERIC && (w->generic = (uint8_t)generic_space(w, i, mask)) == GENERIC)
                return PYTHON;
            left = of_block(w, i, mask);
            break;
        case ELECT: return PYTHON;
        default: left = of_block(w, i, mask);
        }
        if (left == PYTHON || left == GROW) {
            if (i->kind == BRANCH_INDEX)
                w->pc++;
            return left;
        }
        if (!is_defined)
            mark_results(w, i, mask, &undefined);
        int64_t *row = w->counts + COLUMNS * pc;
        row[EXECUTIONS]++;
        row[THREADS] += __builtin_popcount(mask);
        w->pc++;
        w->count++;
        if (left == STOPPED)
            return STOPPED;
    }
    return BUDGET;
}
