"""The compiled arithmetic of the item side: learner, profile and ranker share these kernels.

All of them live in one file because numba stamps its on-disk cache by the file of the called kernel alone: a helper
changed in another file would leave a stale kernel in the cache. Symbols are those of the formulation:

    s_j = beta_j + w . f_j(t) + <zC, phi_j> + sum_h aT_h <zT_h, e_j> + aX <zX, e_j> + <u, M e_j>
        + aK nK sum_k oK[age_k] tK[gap_k] tw_k S_kj,      S_kj = sqrt(C_kj) / ((c_k + 1)(c_j + 1))^.2
    u = (zC, R zT_1, R zT_2, R zX, 1): M maps what is known of the user to the text of what comes next, so that an item
        without a past profits from what others' texts have taught; R = sqrt(T / D) P, a fixed projection
    (w, aT, aX, aK): one learnt vector, plus one of the user's newest entry's gap bucket, plus one of how long the
        history is
    zC = sum_k wt_k y_k + x: x is the sum of two learnt vectors, for the same two buckets: which items come first, after
        a pause, in the middle of an act

    softmax cross-entropy of the positive against the message's targets and K uniform candidates (each of these weighs
    exp(s) n / K), g_j = 1[j = i] - p_j; all gradients of a message from the state at its start, one AdaGrad step
    (Duchi 2011) a touched row: G += mean(d^2), x += lr d / sqrt(G), where d is the message's summed gradient.
    The steps of w, aT, aX, aK find their own size: delta-bar-delta (Jacobs 1988), a gain that grows while gradients
    agree.

Arrays grow by doubling and keep their types, so nothing is compiled twice. Kernels are single-threaded; the matrix
products go to BLAS, which the process is expected to keep at one thread. Those that take long (a message, a catalogue)
release the GIL. The short ones keep it: to get it back costs a switch interval beside a busy loop, up to 1 ms, for a
call of some microseconds.

A kernel that is called by another is inlined into it, always. Left to the compiler, a function has a copy in every
caller, optimised again, with its sums in another order; which copy runs depends on what the process compiled and what
it took from the cache, so that two processes differ in the last bits.

A loop that writes an array sums no floats. The compiler makes two of one that writes: lanes side by side, which is for
arrays that lie apart, and one by one; small arrays lie close together or not, as the heap is. A sum then comes in
another order; all else is the same bits both ways, because quotients and roots are exact here (no `arcp`, no `afn`:
lanes would take estimates of them). `python -m bench loops` looks for such sums in what was compiled.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# The kernels are typed by numba: their shapes and types stand at the NamedTuples and in their docstrings.

from typing import Any, Final, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

Array = npt.NDArray[Any]

RECORD: Final = np.dtype(
    [
        ("beta", "<f4"),  # learnt constant beta_j
        ("square_beta", "<f4"),  # AdaGrad accumulators G of beta, phi and y
        ("square_phi", "<f4"),
        ("square_y", "<f4"),
        ("count_10", "<f4"),  # positives, decayed with half-lives of 10, 100, 1000 positives of the whole stream,
        ("count_100", "<f4"),  # as of last_step
        ("count_1000", "<f4"),
        ("count", "<f4"),  # positives
        ("evidence", "<f4"),  # c_j: positives + .5 for each low rating
        ("damping", "<f4"),  # (c_j + 1)^-.2
        ("entered_ts", "<u4"),  # Unix s
        ("last_ts", "<u4"),  # of the last positive
        ("entered_step", "<i8"),  # the stream's count of positives at entry
        ("last_step", "<i8"),  # ... at this item's last positive; -1: none
    ]
)
assert RECORD.itemsize == 64  # one cache line

# Flags of a row.
KNOWN: Final = 1  # entered the catalogue once: has an id
ACTIVE: Final = 2  # a candidate
WITHDRAWN: Final = 4
VECTOR: Final = 8  # has a text vector
ENTERING: Final = 16  # inside one message: becomes active in it
STARTING: Final = 32  # inside one message: is active from the example at hand on

# The stream's scalars, float64.
STEP: Final = 0  # positives learnt
CLOCK: Final = 1  # highest event time, Unix s; -1 before the first event
FIRST_TS: Final = 2  # event time of the first event
SHARP: Final = 3  # a: p_ij = exp(a s_ij) / sum_k exp(a s_ik)
SHARP_SQUARE: Final = 4
VECTORS: Final = 5  # activated items that had a text vector: what mu is the mean of
ROWS: Final = 6
ACTIVES: Final = 7
ENTRIES: Final = 8  # calls of enter, which break ties of pending items
MESSAGES: Final = 9
LOSS: Final = 10  # sum of the sampled cross-entropy
LOSSES: Final = 11
RANK_CREDIT: Final = 12  # item scores that ranking in full may still cost
SCALARS: Final = 16

FEATURES: Final = 11
AGES: Final = 11
GAPS: Final = 9
TEXT_HEADS: Final = 3  # texts of the history's items with g = .7 and .97, the user's own words

# theta: all learnt scalars in one vector.
T_FEATURE: Final = 0  # w
T_TEXT: Final = T_FEATURE + FEATURES  # aT, aX
T_NEIGHBOUR: Final = T_TEXT + TEXT_HEADS  # aK
COEFFICIENTS: Final = T_NEIGHBOUR + 1  # w, aT, aX, aK: each step has its gain
T_AGE: Final = COEFFICIENTS  # om; from here on kept >= 0
T_GAP: Final = T_AGE + AGES  # ta
T_AGE_K: Final = T_GAP + GAPS  # oK
T_GAP_K: Final = T_AGE_K + AGES  # tK
T_SINCE: Final = T_GAP_K + GAPS  # (SINCES, COEFFICIENTS) added by the newest entry's gap bucket + 1; 0: no entry
SINCES: Final = GAPS + 1
T_LENGTH: Final = T_SINCE + SINCES * COEFFICIENTS  # (LENGTHS, COEFFICIENTS) added by the length of the history
LENGTHS: Final = 8  # 0, 1, 2-3, 4-7, 8-15, 16-31, 32-63, 64+ entries
CONTEXTS: Final = SINCES + LENGTHS  # rows of x
THETA: Final = T_LENGTH + LENGTHS * COEFFICIENTS

HEADS: Final = 5  # of M: D rows each for zC and the texts (TEXT_HEADS of them), one row for the constant

TEXT_HISTORY: Final = 40  # entries of the history in the text heads
TEXT_DECAYS: Final = (0.7, 0.97)
TEXT_WEIGHT_MAX: Final = 4.0
SQUARE_START: Final = 0.01  # every AdaGrad accumulator starts here, but
CONTEXT_SQUARE_START: Final = 0.11  # those of x: every example of a bucket moves it, so that its first steps are noise
GAIN_STEP: Final = 0.1  # added to a gain where gradients agree; where they do not, it loses twice this share
GAIN_MIN: Final = 0.25
GAIN_MAX: Final = 16.0
COURSE_DECAY: Final = 0.9  # a message, of the mean of steps that a gradient is held against
COUNT_DECAY: Final = 0.9  # co-occurrence weight per step back in the history
COUNTED: Final = 22  # entries that are counted, down to a weight of .1
ACT_WEIGHT: Final = 2.0  # what a pair within one act (gap bucket 0) counts; any other: 1
AGE_MIDS: Final = (0.0, 1.0, 2.0, 3.0, 4.5, 7.0, 10.5, 16.5, 28.0, 48.0, 80.0)
POPULARITIES: Final = 4  # running popularity: half-lives of 10, 100, 1000 positives, all-time
KNN_DECAY: Final = 0.65  # of item-kNN, per entry further back in the history
KNN_PRIOR: Final = 0.001  # what a positive counts there, decayed with a half-life of KNN_POPULARITY
KNN_POPULARITY: Final = 2
RANK_CREDIT_EXAMPLES_MAX: Final = 1024  # whose allowance is kept at the most
LISTED: Final = 10  # of the best candidates, whose probabilities are told

CLOSED: Final = -1e30  # the score of a row that is no candidate

DIRTY_DENSE: Final = 1
DIRTY_NEIGHBOURS: Final = 2
DIRTY_STATIC: Final = 4

# Odd constants of splitmix64 (Steele, Lea, Flood 2014) and its relatives.
GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
SEED_STRIDE: Final = np.uint64(0xD1B54A32D192ED03)

OPTIONS: Final = {
    "cache": True,
    "fastmath": {"nnan", "ninf", "nsz", "reassoc", "contract"},
    "error_model": "numpy",
    "boundscheck": False,
    "forceinline": True,
    "no_cfunc_wrapper": True,
}
RELEASING: Final = {**OPTIONS, "nogil": True}
INNER: Final = {**OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # called from kernels alone
f4 = np.float32
u8 = np.uint64  # of an index that is loaded: each use of a signed one asks whether it is negative


class Matrix(NamedTuple):
    """The arrays of an ItemMatrix: N rows of capacity, D learnt and T text dimensions, M neighbours."""

    key: Array  # (N,) int64
    flags: Array  # (N,) uint8
    rec: Array  # (N,) RECORD
    phi: Array  # (N, D) float32
    y: Array  # (N, D) float32
    e: Array  # (N, T) float32
    neighbour: Array  # (N, M) int32 rows
    weight: Array  # (N, M) float32 C_kj
    length: Array  # (N,) int32 neighbours in use
    mu: Array  # (T,) float32
    metric: Array  # (T, T) float32, W'W of the encoder's adapter W: texts are compared by <x, W'W e>; (0, 0): none
    rival: Array  # (T, T) float32, that of the trial's challenger; (0, 0): none, or the encoder as it is
    arm: Array  # (256,) uint8: 1 where a bucket's users have the challenger; all 0 where no trial is on
    theta: Array  # (THETA,) float32
    square: Array  # (THETA,) float32 accumulators of theta
    gain: Array  # (COEFFICIENTS,) float32: times the step of w, aT, aX, aK
    course: Array  # (COEFFICIENTS,) float32: decayed mean of their steps, before gain and step size
    context: Array  # (CONTEXTS, D) float32 x: SINCES rows, then LENGTHS
    context_square: Array  # (CONTEXTS,) float32 accumulators of its rows
    map: Array  # (4 D + 1, T) float32 M
    map_square: Array  # (4 D + 1,) float32 accumulators of its rows
    map_dirty: Array  # (HEADS,) uint8
    project: Array  # (D, T) float32 P, fixed, orthonormal
    scalar: Array  # (SCALARS,) float64
    table_key: Array  # (C,) int64 open addressing, C a power of two
    table_row: Array  # (C,) int32, -1: empty
    dirty: Array  # (N,) uint8 DIRTY_*
    dirty_row: Array  # (N,) int32 the rows with a dirty bit
    dirty_total: Array  # (2,) int64: rows in dirty_row, bytes of their dense and neighbour records


class Work(NamedTuple):
    """Scratch of the learner; B examples, K candidates, L history entries, R rows ranked, C messages at a time."""

    targets: Array  # (C, B) int32 rows
    histories: Array  # (C, B, L) int32 rows
    unknown: Array  # (B + B L,) int64 keys without a row
    target: Array  # (B,) int32 rows, of the message at hand
    history: Array  # (B, L) int32 rows
    go: Array  # (B,) bool: gives a gradient
    wt: Array  # (B, L) float32 n om ta tw
    ck: Array  # (B, L) float32 nK oK tK tw (c_k + 1)^-.2
    age: Array  # (B, L) int32 bucket
    gap: Array  # (B, L) int32 bucket
    norm: Array  # (B,) float32 n
    norm_k: Array  # (B,) float32 nK
    z: Array  # (B, D) float32 zC
    user: Array  # (B, D + T) float32: zC, and the metric times sum_h a_h zT_h, plus u M
    text: Array  # (B, 3, T) float32 zT_h, zX
    words: Array  # (B, T) float32: sum_h a_h zT_h, before the metric
    logit: Array  # (B, K) float32: s in the loss, as if all weighed alike; CLOSED: no negative
    unit: Array  # (B, 4 D + 1) float32 u of the examples with a gradient, side by side
    since: Array  # (B,) int32: 1 + gap bucket of the newest entry
    length: Array  # (B,) int32 bucket of the history's length
    coefficient: Array  # (B, COEFFICIENTS) float32
    slope: Array  # (B, COEFFICIENTS) float32 their gradients
    slot: Array  # (N,) int16: 1 + candidate number
    cand: Array  # (K,) int32 rows
    item: Array  # (K, D + T) float32: phi and e of the candidates
    column: Array  # (COLUMNS, K) float32
    feature: Array  # (blocks, FEATURES, K) float32, of the candidates as of each block of examples
    beta: Array  # (K,) float32 of the candidates
    bias: Array  # (K,) float32
    feature_i: Array  # (B, FEATURES, 1) float32 of the targets
    score_i: Array  # (B,) float32
    cooc: Array  # (B, K) float32 sum_k ck S_kj
    cooc_i: Array  # (B,) float32
    damping: Array  # (K,) float32 (c_j + 1)^-.2 of the candidates
    damping_i: Array  # (B,) float32 of the targets, before their events are counted
    near_i: Array  # (B, LK) float32 sqrt(C_ki) of the targets, before their events are counted
    place: Array  # (L,) int32 of a target among the neighbours of its history's entries; -1: it is none
    linked: Array  # (N,) int32: 1 + number of an item that has links
    link_row: Array  # (B LK,) int32 the items that have
    link_start: Array  # (B LK + 1,) int32
    link_slot: Array  # (links,) uint16: number of a neighbour that is a candidate
    link_value: Array  # (links,) float32 sqrt(C) at the message's start
    change_first: Array  # (B LK,) int32: the newest of what has changed for an item since then; -1: nothing
    change_next: Array  # (changes,) int32: the one before it; -1: none
    change_slot: Array  # (changes,) uint16
    change_value: Array  # (changes,) float32, to be added
    changes: Array  # (1,) int64 how many there are
    grad_i: Array  # (B,) float32
    step_phi: Array  # (K + B, D) float32 summed gradients
    step_beta: Array  # (K + B,) float32
    row_phi: Array  # (K + B,) int32
    slot_y: Array  # (N,) int32: 1 + slot of a history item
    step_y: Array  # (B LY, D) float32
    row_y: Array  # (B LY,) int32
    step_context: Array  # (CONTEXTS, D) float32
    theta: Array  # (THETA,) float32 gradient
    weight_c: Array  # (K,) float32
    score: Array  # (N,) float32
    dense: Array  # (R N,) float32
    rival: Array  # (N,) float32
    rival_history: Array  # (L,) float32
    ranked: Array  # (B,) bool: is ranked in full
    skip: Array  # (N,) uint8
    bias_j: Array  # (N,) float32
    popularity: Array  # (POPULARITIES, N) float32


class Outcomes(NamedTuple):
    """What ranking in full gave, a row an example; candidates is 0 where the example was not ranked."""

    candidates: Array  # (B,) int32
    rank: Array  # (B,) float64
    popularity_rank: Array  # (B, POPULARITIES) float64
    knn_rank: Array  # (B,) float64 by item-kNN
    probability: Array  # (B,) float64 p of the target
    log_loss: Array  # (B,) float64 -ln p_i - sum_{j != i} ln(1 - p_j)
    raw_log_loss: Array  # (B,) float64 the same of p = sigmoid(s)
    popularity_log_loss: Array  # (B, POPULARITIES) float64 the same of p = (1 + count) / sum (1 + count)
    listed: Array  # (B, LISTED) float64 p of the best candidates, best first; -1 where there are fewer
    place: Array  # (B,) int32 of the target in that list, -1: not in it


class Steps(NamedTuple):
    """The learner's constants, as the kernels take them."""

    negatives: int
    cooccurrence_history: int
    y_history: int
    seed: int
    refresh: int  # examples after which the candidates' features are taken anew
    rank_items: int  # item scores that ranking in full may cost an example; 0: no limit
    lr_phi: float
    lr_y: float
    lr_beta: float
    lr_scale: float
    lr_decay: float
    lr_setting: float
    lr_map: float
    lr_context: float
    lr_sharp: float
    start: float
    backward: float


@intrinsic
def _bits_of(typing_context, x):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _float_of(typing_context, x):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _prefetch(typing_context, address):
    def codegen(context, builder, signature, args):
        pointer = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        constants = [ir.Constant(word, value) for value in (0, 3, 1)]  # read, keep, data
        builder.call(function, [builder.inttoptr(args[0], pointer), *constants])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@nb.njit(**INNER)
def _log(x):
    """ln x of x > 0 in float32, relative error about 1e-6, without a call of libm (so that loops vectorise)."""
    bits = _bits_of(x)
    exponent = f4((bits >> np.int32(23)) - np.int32(127))
    t = _float_of((bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000)) - f4(1)
    p = f4(-0.0064535442)
    p = p * t + f4(0.0360884937)
    p = p * t + f4(-0.0953293897)
    p = p * t + f4(0.1676540711)
    p = p * t + f4(-0.2407338084)
    p = p * t + f4(0.3317990258)
    p = p * t + f4(-0.4998741238)
    p = p * t + f4(0.9999964239)
    return exponent * f4(0.69314718) + p * t


@nb.njit(**INNER)
def _exp2(x):
    """2^x in float32, clipped to [-126, 126], relative error about 2e-7."""
    x = max(f4(-126), min(f4(126), x))
    whole = np.floor(x)
    t = x - whole
    p = f4(0.0018775767)
    p = p * t + f4(0.0089893397)
    p = p * t + f4(0.0558263180)
    p = p * t + f4(0.2401536217)
    p = p * t + f4(0.6931530732)
    p = p * t + f4(0.9999999404)
    return p * _float_of((np.int32(whole) + np.int32(127)) << np.int32(23))


@nb.njit(**INNER)
def _exp(x):
    return _exp2(x * f4(1.44269504))


@nb.njit(**INNER)
def _mix(x):
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@nb.njit(**OPTIONS)
def age_bucket(back):
    """Bucket of an entry `back` of the user's own entries ago: 0, 1, 2, 3, 4-5, 6-8, 9-12, 13-20, 21-35, 36-60, 61+."""
    if back < 4:
        return back
    if back < 6:
        return 4
    if back < 9:
        return 5
    if back < 13:
        return 6
    if back < 21:
        return 7
    if back < 36:
        return 8
    if back < 61:
        return 9
    return 10


@nb.njit(**OPTIONS)
def gap_bucket(gap_s):
    """Bucket of the seconds between an entry and now: under a second (one act), 10 s, a minute, 10 minutes, an hour,
    12 hours, 2 days, 2 weeks, more."""
    if gap_s < 1.0:
        return 0
    if gap_s <= 10.0:
        return 1
    if gap_s <= 60.0:
        return 2
    if gap_s <= 600.0:
        return 3
    if gap_s <= 3600.0:
        return 4
    if gap_s <= 43_200.0:
        return 5
    if gap_s <= 172_800.0:
        return 6
    if gap_s <= 1_209_600.0:
        return 7
    return 8


# --- key -> row ---------------------------------------------------------------------------------------------------


@nb.njit(**OPTIONS)
def find(table_key, table_row, key):
    """Row of a key, or -1."""
    mask = np.uint64(len(table_key) - 1)
    place = _mix(np.uint64(key)) & mask
    while table_row[place] >= 0:
        if table_key[place] == key:
            return table_row[place]
        place = (place + np.uint64(1)) & mask
    return np.int32(-1)


@nb.njit(**RELEASING)
def fill_table(table_key, table_row, key, first, rows):
    """Puts key[first:rows] into the table; the keys must be new to it. Key 0 is a row without a key yet."""
    mask = np.uint64(len(table_key) - 1)
    for row in range(first, rows):
        if key[row] == 0:
            continue
        place = _mix(np.uint64(key[row])) & mask
        while table_row[place] >= 0:
            place = (place + np.uint64(1)) & mask
        table_key[place] = key[row]
        table_row[place] = row


@nb.njit(**OPTIONS)
def find_many(table_key, table_row, keys, out):
    """out[q] = row of keys[q], or -1."""
    for q in range(len(keys)):
        out[q] = find(table_key, table_row, keys[q])


@nb.njit(**OPTIONS)
def find_examples(table_key, table_row, x, target, history, unknown):
    """Rows of the targets and histories; the keys without a row go to `unknown`. Returns how many these are."""
    missing = 0
    for b in range(x.count):
        target[b] = find(table_key, table_row, x.item[b])
        if target[b] < 0:
            unknown[missing] = x.item[b]
            missing += 1
        for q in range(x.history_count[b]):
            row = find(table_key, table_row, x.history_item[b, q])
            history[b, q] = row
            if row < 0:
                unknown[missing] = x.history_item[b, q]
                missing += 1
    return missing


# --- what changed -------------------------------------------------------------------------------------------------


@nb.njit(**OPTIONS)
def mark(m, row, bits, record_bytes):
    """Marks the row's records as changed. record_bytes: (header, dense record, of one neighbour)."""
    old = m.dirty[row]
    new = old | bits
    if new == old:
        return
    if old == 0:
        m.dirty_row[m.dirty_total[0]] = row
        m.dirty_total[0] += 1
    if new & ~old & DIRTY_DENSE:
        m.dirty_total[1] += record_bytes[1]
    if new & ~old & DIRTY_NEIGHBOURS:
        m.dirty_total[1] += record_bytes[0] + record_bytes[2] * m.length[row]
    m.dirty[row] = new


# --- bias ---------------------------------------------------------------------------------------------------------

# Columns of a block of rows: what the features are made of.
C_COUNT_10: Final = 0
C_COUNT_100: Final = 1
C_COUNT_1000: Final = 2
C_COUNT: Final = 3
C_SINCE: Final = 4  # positives of the stream since this item's last one, or its entry
C_SINCE_ENTRY: Final = 5
C_QUIET_S: Final = 6  # seconds since its last positive, or its entry
C_AGE_S: Final = 7  # seconds since its entry
C_NEW: Final = 8  # 1 before its first positive
C_BETA: Final = 9
COLUMNS: Final = 10
BLOCK: Final = 256  # rows whose columns are at hand at once


@nb.njit(**INNER)
def _columns(rec, row, step, ts, first_ts, column, at):
    """Column values of one row, as of `step` positives and `ts` s."""
    r = rec[row]
    new = r.last_step < 0
    entered_ts = max(np.int64(r.entered_ts), first_ts)
    column[C_COUNT_10, at] = r.count_10
    column[C_COUNT_100, at] = r.count_100
    column[C_COUNT_1000, at] = r.count_1000
    column[C_COUNT, at] = r.count
    column[C_SINCE, at] = f4(step - (r.entered_step if new else r.last_step))
    column[C_SINCE_ENTRY, at] = f4(step - r.entered_step)
    column[C_QUIET_S, at] = f4(max(np.int64(0), ts - (entered_ts if new else np.int64(r.last_ts))))
    column[C_AGE_S, at] = f4(max(np.int64(0), ts - entered_ts))
    column[C_NEW, at] = f4(1) if new else f4(0)
    column[C_BETA, at] = r.beta


@nb.njit(**INNER)
def _feature_columns(column, n, feature):
    """Features f_j (FEATURES, n) of a block of rows, from its columns; the counts are decayed in place. Popularity:
    0-3, 6; age: 4, 7; recency: 5, 8, 9, 10."""
    for i in range(n):
        since = column[C_SINCE, i]
        column[C_COUNT_10, i] *= _exp2(since * f4(-0.1))
        column[C_COUNT_100, i] *= _exp2(since * f4(-0.01))
        column[C_COUNT_1000, i] *= _exp2(since * f4(-0.001))
    for q in range(4):
        for i in range(n):
            feature[q, i] = _log(f4(1) + column[q, i])
    for i in range(n):
        feature[4, i] = f4(0.3) * _log(f4(1) + column[C_SINCE_ENTRY, i])
        feature[5, i] = f4(0.3) * _log(f4(1) + column[C_SINCE, i])
        feature[6, i] = column[C_NEW, i]
        feature[7, i] = f4(0.15) * _log(f4(1) + column[C_AGE_S, i])
        feature[8, i] = f4(0.15) * _log(f4(1) + column[C_QUIET_S, i])
        feature[9, i] = f4(0.4) * feature[5, i] * feature[5, i]
        feature[10, i] = f4(0.4) * feature[8, i] * feature[8, i]


@nb.njit(**INNER)
def _add_bias(feature, n, coefficient, out):
    """out[i] += w . f_i of n rows."""
    for q in range(FEATURES):
        x = coefficient[q]
        for i in range(n):
            out[i] += x * feature[q, i]


@nb.njit(**OPTIONS)
def coefficients(theta, since, entries, out):
    """(w, aT, aX, aK) for a user into out (COEFFICIENTS,). since: 1 + gap bucket of the newest entry, 0 where there is
    none; entries: of the history. Returns the bucket of that length."""
    length = 0
    while length < LENGTHS - 1 and entries >> length > 0:
        length += 1
    for q in range(COEFFICIENTS):
        out[q] = theta[q] + theta[T_SINCE + since * COEFFICIENTS + q] + theta[T_LENGTH + length * COEFFICIENTS + q]
    return length


@nb.njit(**OPTIONS)
def add_context(context, since, length, z):
    """z += x of a user whose newest entry has this gap bucket + 1 (0: no entry), whose history this length bucket."""
    for d in range(len(z)):
        z[d] += context[since, d] + context[SINCES + length, d]


@nb.njit(**OPTIONS)
def bias_of(m, row, ts, coefficient, feature):
    """b_j(t) of one row; leaves f_j in feature (FEATURES, 1)."""
    column = np.empty((COLUMNS, 1), np.float32)
    _columns(m.rec, row, np.int64(m.scalar[STEP]), np.int64(ts), np.int64(m.scalar[FIRST_TS]), column, 0)
    _feature_columns(column, 1, feature)
    total = m.rec[row].beta
    for q in range(FEATURES):
        total += coefficient[q] * feature[q, 0]
    return total


@nb.njit(**INNER)
def _bias_all(m, rows, ts, coefficient, out, popularity):
    """b_j(t) of rows 0..rows-1 as of event time ts, s, into out; popularity (POPULARITIES, rows or more): positives
    decayed to now with half-lives of 10, 100, 1000 positives of the stream, and undecayed."""
    column = np.empty((COLUMNS, BLOCK), np.float32)
    feature = np.empty((FEATURES, BLOCK), np.float32)
    step = np.int64(m.scalar[STEP])
    first_ts = np.int64(m.scalar[FIRST_TS])
    for start in range(0, rows, BLOCK):
        n = min(BLOCK, rows - start)
        for i in range(n):
            _columns(m.rec, start + i, step, np.int64(ts), first_ts, column, i)
        _feature_columns(column, n, feature)
        out[start : start + n] = column[C_BETA, :n]
        _add_bias(feature, n, coefficient, out[start : start + n])
        for h in range(len(popularity)):
            popularity[h, start : start + n] = column[C_COUNT_10 + h, :n]


@nb.njit(**RELEASING)
def features_all(m, rows, ts, out):
    """f_j(t) of rows 0..rows-1 as of event time ts, s, into out (FEATURES, rows or more)."""
    column = np.empty((COLUMNS, BLOCK), np.float32)
    feature = np.empty((FEATURES, BLOCK), np.float32)
    step = np.int64(m.scalar[STEP])
    first_ts = np.int64(m.scalar[FIRST_TS])
    for start in range(0, rows, BLOCK):
        n = min(BLOCK, rows - start)
        for i in range(n):
            _columns(m.rec, start + i, step, np.int64(ts), first_ts, column, i)
        _feature_columns(column, n, feature)
        out[:, start : start + n] = feature[:, :n]


@nb.njit(**INNER)
def _feature_candidates(m, rows, ts, column, feature):
    """As features_all, for the given rows; (FEATURES, len(rows))."""
    step = np.int64(m.scalar[STEP])
    first_ts = np.int64(m.scalar[FIRST_TS])
    for i in range(len(rows)):
        _columns(m.rec, rows[i], step, np.int64(ts), first_ts, column, i)
    _feature_columns(column, len(rows), feature)


# --- the user's vectors -------------------------------------------------------------------------------------------


@nb.njit(**OPTIONS)
def behaviour_vector(m, ts, rows, row_ts, tw, lk, wt, ck, age, gap, z):
    """zC = n sum_k om ta tw y_k into z (D,); the coefficients wt = n om ta tw and
    ck = nK oK tK tw (c_k + 1)^-.2 of each entry; its buckets. Returns (n, nK).

    rows, row_ts, tw: (m,) the history, newest first; lk: entries in the co-occurrence block.
    """
    theta = m.theta
    total = f4(0)
    total_k = f4(0)
    for q in range(len(rows)):
        a = age_bucket(q)
        g = gap_bucket(ts - row_ts[q])
        age[q] = a
        gap[q] = g
        wt[q] = theta[T_AGE + a] * theta[T_GAP + g] * tw[q]
        total += abs(wt[q])
        if q < lk:
            ck[q] = theta[T_AGE_K + a] * theta[T_GAP_K + g] * tw[q]
            total_k += ck[q]
    n = f4(1) / np.sqrt(total + f4(1e-6))
    n_k = f4(1) / np.sqrt(np.sqrt(total_k + f4(1e-6)))
    z[:] = 0
    for q in range(len(rows)):
        wt[q] *= n
        x = wt[q]
        y = m.y[rows[q]]
        for d in range(len(z)):
            z[d] += x * y[d]
        if q < lk:
            ck[q] *= m.rec[rows[q]].damping * n_k
    return n, n_k


@nb.njit(**OPTIONS)
def history_texts(m, rows, tw, out, coefficient):
    """zT_h = (sum g^q tw e_k / sum g^q tw - mu) sqrt(min(sum, 4)) into out[0:2] (2, T).

    coefficient (2, L): what (e_k - mu) of entry q weighs in zT_h; 0 where the item has no text vector.
    """
    out[0] = 0
    out[1] = 0
    coefficient[:, : len(rows)] = 0
    near = f4(1)
    far = f4(1)
    near_total = f4(0)
    far_total = f4(0)
    for q in range(min(len(rows), TEXT_HISTORY)):
        if m.flags[rows[q]] & VECTOR:
            near_q = near * tw[q]
            far_q = far * tw[q]
            near_total += near_q
            far_total += far_q
            e = m.e[rows[q]]
            for d in range(len(e)):
                out[0, d] += near_q * e[d]
                out[1, d] += far_q * e[d]
            coefficient[0, q] = near_q
            coefficient[1, q] = far_q
        near *= f4(TEXT_DECAYS[0])
        far *= f4(TEXT_DECAYS[1])
    if near_total <= 0:
        return
    near_n = np.sqrt(min(near_total, f4(TEXT_WEIGHT_MAX)))
    far_n = np.sqrt(min(far_total, f4(TEXT_WEIGHT_MAX)))
    near_share = near_n / near_total
    far_share = far_n / far_total
    for d in range(out.shape[1]):
        out[0, d] = out[0, d] * near_share - m.mu[d] * near_n
        out[1, d] = out[1, d] * far_share - m.mu[d] * far_n
    for q in range(min(len(rows), TEXT_HISTORY)):
        coefficient[0, q] *= near_share
        coefficient[1, q] *= far_share


@nb.njit(**OPTIONS)
def own_text(mu, text, text_weight, out):
    """zX = (text - mu) sqrt(min(text_weight, 4)) into out (T,)."""
    n = np.sqrt(min(text_weight, f4(TEXT_WEIGHT_MAX)))
    for d in range(len(out)):
        out[d] = (text[d] - mu[d]) * n


@nb.njit(**OPTIONS)
def adapted(metric, vectors):
    """(n, T): the vectors times the metric, which is symmetric; themselves where there is none."""
    return np.dot(vectors, metric) if metric.shape[0] > 0 else vectors


@nb.njit(**INNER)
def _adapted_by_arm(m, x, at, vectors):
    """(n, T) vectors of the examples `at`, each by the metric of its user's arm. Both products are of all the vectors:
    the bits of a product depend on how many rows it has."""
    moved = adapted(m.metric, vectors)
    challengers = 0
    for a in range(len(at)):
        challengers += m.arm[x.bucket[at[a]]]
    if challengers == 0:
        return moved
    theirs = adapted(m.rival, vectors)
    mixed = np.empty_like(vectors)
    for a in range(len(at)):
        mixed[a] = theirs[a] if m.arm[x.bucket[at[a]]] else moved[a]
    return mixed


@nb.njit(**OPTIONS)
def map_user(m, z, text, unit, user_text):
    """u of n users into unit (n, 4 D + 1), and user_text (n, T) += u M. z: (n, D); text: (n, 3, T) zT_h, zX."""
    n = len(z)
    dim = m.project.shape[0]
    scale = f4(np.sqrt(m.project.shape[1] / dim))
    unit[:n, :dim] = z
    unit[:n, dim : 4 * dim] = 0
    heads = TEXT_HEADS if np.any(text[:, TEXT_HEADS - 1]) else TEXT_HEADS - 1
    for h in range(heads):
        part = np.dot(np.ascontiguousarray(text[:, h]), m.project.T)
        for b in range(n):
            for d in range(dim):
                unit[b, dim * (h + 1) + d] = scale * part[b, d]
    unit[:n, 4 * dim] = 1
    used = (1 + heads) * dim
    user_text += np.dot(np.ascontiguousarray(unit[:n, :used]), m.map[:used]) + m.map[4 * dim]


# --- entering -----------------------------------------------------------------------------------------------------


@nb.njit(**OPTIONS)
def start_row(m, row, start):
    """Takes the row's text vector into mu and starts phi and y from it: start sqrt(D) P(e - mu) / |P(e - mu)|.

    An item that had been withdrawn keeps what it learnt.
    """
    if not m.flags[row] & VECTOR:
        return
    e = m.e[row]
    m.scalar[VECTORS] += 1
    share = f4(1.0 / m.scalar[VECTORS])
    for d in range(len(e)):
        m.mu[d] += (e[d] - m.mu[d]) * share
    if m.flags[row] & WITHDRAWN:
        return
    dim = m.project.shape[0]
    direction = np.zeros(dim, np.float32)
    norm = f4(0)
    for a in range(dim):
        total = f4(0)
        for d in range(len(e)):
            total += m.project[a, d] * (e[d] - m.mu[d])
        direction[a] = total
        norm += total * total
    norm = f4(start) * np.sqrt(f4(dim)) / np.sqrt(norm + f4(1e-9))
    for a in range(dim):
        m.phi[row, a] += direction[a] * norm
        m.y[row, a] += direction[a] * norm


@nb.njit(**OPTIONS)
def activate(m, row, ts):
    """Makes the row a candidate from now on; ts: when it entered, s."""
    m.flags[row] = (m.flags[row] & ~(WITHDRAWN | ENTERING | STARTING)) | ACTIVE
    m.scalar[ACTIVES] += 1
    m.rec[row].entered_step = np.int64(m.scalar[STEP])
    m.rec[row].entered_ts = np.uint32(max(0.0, min(4294967295.0, ts)))


# --- co-occurrence ------------------------------------------------------------------------------------------------


@nb.njit(**INNER)
def _fetch(address, size):
    """Asks for memory that is read soon."""
    for at in range(0, size, 64):
        _prefetch(address + at)


@nb.njit(**INNER)
def _place(neighbours, j):
    """Where j is among an item's neighbours; -1: nowhere."""
    place = -1
    for r in range(len(neighbours)):
        place = max(place, r if neighbours[r] == j else -1)
    return place


@nb.njit(**INNER)
def _least(weight):
    """Where the lowest count is, the first of equals. The bits of floats that are not negative order as they do."""
    least = np.int64(1) << np.int64(62)
    for r in range(len(weight)):
        ordered = (np.int64(_bits_of(weight[r])) << np.int64(16)) | np.int64(r)
        least = ordered if ordered < least else least
    return least & np.int64(0xFFFF)


@nb.njit(**INNER)
def _find_target(m, w, target, history):
    """Where the target is among the neighbours of each entry of its history, into w.place."""
    row_bytes = np.int64(m.neighbour.shape[1]) * 4
    for q in range(len(history)):
        if q + 2 < len(history):
            ahead = np.int64(history[q + 2])
            _fetch(np.int64(m.neighbour.ctypes.data) + ahead * row_bytes, m.length[ahead] * 4)
            _fetch(np.int64(m.weight.ctypes.data) + ahead * row_bytes, m.length[ahead] * 4)
        k = history[q]
        w.place[q] = _place(m.neighbour[k, : m.length[k]], target)


@nb.njit(**INNER)
def _count_event(m, w, row, positive, ts, history, history_ts, backward, record_bytes):
    """One event's evidence: C_ki += .9^q for the q-th entry k of the history (rows), C_ik += backward .9^q: what came
    after tells more; both ACT_WEIGHT times that within one act. A full row's newcomer evicts the lowest count and
    starts at its own weight.

    A low rating counts here as any other event: what is met together is. It is no positive. Both sides of a pair in one
    body, for each call with tuples of arrays costs as much as a pair.
    """
    amount = f4(1)
    limit = m.neighbour.shape[1]
    changes = w.changes[0]
    mark(m, row, DIRTY_DENSE, record_bytes)
    for q in range(min(len(history), COUNTED)):
        one_act = gap_bucket(ts - history_ts[q]) == 0
        weight = amount * f4(ACT_WEIGHT) if one_act else amount
        amount *= f4(COUNT_DECAY)
        if history[q] == row:
            continue
        for side in range(2):
            k = history[q] if side == 0 else row
            j = row if side == 0 else history[q]
            more = weight if side == 0 else weight * f4(backward)
            if m.dirty[k] & DIRTY_NEIGHBOURS == 0:
                mark(m, k, DIRTY_NEIGHBOURS, record_bytes)
            used = m.length[k]
            place = w.place[q] if side == 0 else -1
            if place < 0:  # looked for again: an entry may be in the history twice
                place = _place(m.neighbour[k, :used], j)
            told = w.linked[k] - 1
            before = f4(0)
            if place >= 0:
                before = m.weight[k, place]
            elif used < limit:
                place = used
                m.length[k] = used + 1
                m.dirty_total[1] += record_bytes[2]
            else:
                place = _least(m.weight[k])
                evicted = w.slot[m.neighbour[k, place]]
                if told >= 0 and evicted > 0:
                    w.change_slot[changes] = evicted - 1
                    w.change_value[changes] = -np.sqrt(m.weight[k, place])
                    w.change_next[changes] = w.change_first[told]
                    w.change_first[told] = changes
                    changes += 1
            m.neighbour[k, place] = j
            m.weight[k, place] = before + more
            if told >= 0 and w.slot[j] > 0:
                w.change_slot[changes] = w.slot[j] - 1
                w.change_value[changes] = np.sqrt(before + more) - np.sqrt(before)
                w.change_next[changes] = w.change_first[told]
                w.change_first[told] = changes
                changes += 1
    w.changes[0] = changes
    _count_item(m, w, row, positive, ts)


@nb.njit(**INNER)
def _count_item(m, w, row, positive, ts):
    """What an event is for its item alone: evidence, counters, recency."""
    r = m.rec[row]
    r.evidence += f4(1) if positive else f4(0.5)
    r.damping = _exp2(f4(-0.2 * 1.44269504) * _log(r.evidence + f4(1)))
    if w.slot[row] > 0:
        w.damping[w.slot[row] - 1] = r.damping
    if positive:
        m.scalar[STEP] += 1
        step = np.int64(m.scalar[STEP])
        if r.last_step >= 0:
            since = f4(step - r.last_step)
            r.count_10 *= _exp2(since * f4(-0.1))
            r.count_100 *= _exp2(since * f4(-0.01))
            r.count_1000 *= _exp2(since * f4(-0.001))
        r.count_10 += f4(1)
        r.count_100 += f4(1)
        r.count_1000 += f4(1)
        r.count += f4(1)
        r.last_step = step
        r.last_ts = np.uint32(max(0.0, min(4294967295.0, ts)))


@nb.njit(**OPTIONS)
def neighbour_scores(m, history, ck, out):
    """out[j] += sum_k ck sqrt(C_kj), without aK and (c_j + 1)^-.2; out is zeroed here, (rows,)."""
    out[:] = 0
    for q in range(len(history)):
        k = history[q]
        x = ck[q]
        for r in range(m.length[k]):
            out[u8(m.neighbour[k, r])] += x * np.sqrt(m.weight[k, r])


# --- one message --------------------------------------------------------------------------------------------------


@nb.njit(**INNER)
def _draw(m, w, x, steps, rows, candidates, position):
    """Up to K different candidates: the message's targets, then uniformly row floor(rows mix(position, q) / 2^32) for
    q = 1, 2, ..., unless it is taken or no candidate; all of them where there are K or fewer. Items that enter inside
    the message count, too. Returns how many, and how many of them were not drawn: a stratum of its own, so that the
    sum over the candidates stays unbiased."""
    count = 0
    if candidates <= steps.negatives:
        for row in range(rows):
            if m.flags[row] & (ACTIVE | ENTERING):
                w.cand[count] = row
                count += 1
                w.slot[row] = count
        return count, 0
    for b in range(x.count):
        row = w.target[b]
        if m.flags[row] & (ACTIVE | ENTERING) and w.slot[row] == 0 and 2 * count < steps.negatives:
            w.cand[count] = row
            count += 1
            w.slot[row] = count
    named = count
    base = _mix(np.uint64(position) * GOLDEN + np.uint64(steps.seed) * SEED_STRIDE)
    for q in range(16 * steps.negatives):
        x = _mix(base + np.uint64(q + 1) * GOLDEN)
        row = np.int32(((x >> np.uint64(32)) * np.uint64(rows)) >> np.uint64(32))
        if m.flags[row] & (ACTIVE | ENTERING) and w.slot[row] == 0:
            w.cand[count] = row
            count += 1
            w.slot[row] = count
            if count == steps.negatives:
                break
    return count, named


@nb.njit(**INNER)
def _gather(m, w, count):
    """The vectors of the candidates side by side: (count, D + T); their beta and damping."""
    dim = m.phi.shape[1]
    for c in range(count):
        if c + 4 < count:
            ahead = np.int64(w.cand[c + 4])
            _fetch(np.int64(m.e.ctypes.data) + ahead * (m.e.shape[1] * 4), m.e.shape[1] * 4)
            _fetch(np.int64(m.phi.ctypes.data) + ahead * (dim * 4), dim * 4)
        row = w.cand[c]
        w.item[c, :dim] = m.phi[row]
        w.item[c, dim:] = m.e[row]
        w.beta[c] = m.rec[row].beta
        w.damping[c] = m.rec[row].damping


@nb.njit(**INNER)
def _user_side(m, w, x, steps, entry_row, entry_at, entries):
    """The users' vectors, example by example; items that enter inside the message get their start on the way. Returns
    the examples that give a gradient: the matrix products are of these alone."""
    done = 0
    dim = m.phi.shape[1]
    coefficient = np.empty((2, x.history_item.shape[1]), np.float32)
    for b in range(x.count):
        while done < entries and entry_at[done] <= 2 * b:
            start_row(m, entry_row[done], steps.start)
            m.flags[entry_row[done]] |= STARTING
            done += 1
        w.go[b] = x.label[b] == 1 and m.flags[w.target[b]] & (ACTIVE | STARTING) != 0
        w.user[b] = 0
        w.z[b] = 0
        w.text[b] = 0
        w.words[b] = 0
        if not w.go[b]:
            continue
        used = x.history_count[b]
        rows = w.history[b, :used]
        for q in range(used):
            _prefetch(np.int64(m.rec.ctypes.data) + np.int64(rows[q]) * 64)
            _fetch(np.int64(m.y.ctypes.data) + np.int64(rows[q]) * (dim * 4), dim * 4)
            if q < TEXT_HISTORY:
                _fetch(np.int64(m.e.ctypes.data) + np.int64(rows[q]) * (m.e.shape[1] * 4), m.e.shape[1] * 4)
        tw = x.history_weight[b, :used]
        w.norm[b], w.norm_k[b] = behaviour_vector(
            m, x.ts[b], rows, x.history_ts[b, :used], tw, steps.cooccurrence_history,
            w.wt[b], w.ck[b], w.age[b], w.gap[b], w.z[b],
        )  # fmt: skip
        history_texts(m, rows, tw, w.text[b], coefficient)
        if x.text_on[b]:
            own_text(m.mu, x.text[b], x.text_weight[b], w.text[b, 2])
        w.since[b] = 1 + w.gap[b, 0] if used > 0 else 0
        w.length[b] = coefficients(m.theta, w.since[b], used, w.coefficient[b])
        add_context(m.context, w.since[b], w.length[b], w.z[b])
        w.user[b, :dim] = w.z[b]
        for h in range(TEXT_HEADS):
            a = w.coefficient[b, T_TEXT + h]
            for d in range(m.e.shape[1]):
                w.words[b, d] += a * w.text[b, h, d]
    while done < entries:
        start_row(m, entry_row[done], steps.start)
        m.flags[entry_row[done]] |= STARTING
        done += 1
    at = np.flatnonzero(w.go[: x.count])
    if len(at) == 0:
        return at
    text = _adapted_by_arm(m, x, at, w.words[at])
    map_user(m, w.z[at], w.text[at], w.unit, text)
    for a in range(len(at)):
        w.user[at[a], dim:] = text[a]
    return at


@nb.njit(**INNER)
def _link(m, w, x, at, steps):
    """Links each item in the co-occurrence blocks of the examples `at` to those of its neighbours that are candidates:
    once a message, however many histories it is in. Returns how many items these are."""
    items = 0
    for a in range(len(at)):
        b = at[a]
        for q in range(min(x.history_count[b], steps.cooccurrence_history)):
            k = w.history[b, q]
            if w.linked[k] == 0:
                w.link_row[items] = k
                w.change_first[items] = -1
                items += 1
                w.linked[k] = items
    w.changes[0] = 0
    slot = w.slot
    link_slot = w.link_slot
    link_value = w.link_value
    row_bytes = np.int64(m.neighbour.shape[1]) * 4
    end = u8(0)
    for n in range(items):
        if n + 2 < items:
            ahead = np.int64(w.link_row[n + 2])
            _fetch(np.int64(m.neighbour.ctypes.data) + ahead * row_bytes, m.length[ahead] * 4)
        k = w.link_row[n]
        neighbour = m.neighbour[k]
        weight = m.weight[k]
        start = end
        for r in range(u8(m.length[k])):  # free of branches: the place of what is no candidate is written over
            link_slot[end] = r
            end += u8(slot[u8(neighbour[r])] != 0)
        for r in range(start, end):
            place = u8(link_slot[r])
            link_slot[r] = slot[u8(neighbour[place])] - 1
            link_value[r] = np.sqrt(weight[place])
        w.link_start[n + 1] = end
    return items


@nb.njit(**INNER)
def _neighbours(m, w, x, b, steps, count):
    """The co-occurrence block of the candidates and of the target (w.cooc, w.cooc_i), as counted so far."""
    score = w.cooc[b]
    score[:count] = 0
    total = f4(0)
    for q in range(min(x.history_count[b], steps.cooccurrence_history)):
        k = w.history[b, q]
        n = w.linked[k] - 1
        x_k = w.ck[b, q]
        for r in range(u8(w.link_start[n]), u8(w.link_start[n + 1])):
            score[w.link_slot[r]] += x_k * w.link_value[r]
        change = w.change_first[n]
        while change >= 0:
            score[w.change_slot[change]] += x_k * w.change_value[change]
            change = w.change_next[change]
        w.near_i[b, q] = np.sqrt(m.weight[k, w.place[q]]) if w.place[q] >= 0 else f4(0)
        total += x_k * w.near_i[b, q]
    w.damping_i[b] = m.rec[w.target[b]].damping
    w.cooc_i[b] = total * w.damping_i[b]
    for c in range(count):
        score[c] *= w.damping[c]


@nb.njit(**INNER)
def _target_score(m, w, x, b):
    """s of the target from the state now; its features stay in w.feature_i."""
    target = w.target[b]
    dim = m.phi.shape[1]
    total = bias_of(m, target, x.ts[b], w.coefficient[b], w.feature_i[b])
    learnt = f4(0)
    for d in range(dim):
        learnt += m.phi[target, d] * w.user[b, d]
    text = f4(0)
    for d in range(m.e.shape[1]):
        text += m.e[target, d] * w.user[b, dim + d]
    return total + learnt + text + w.coefficient[b, T_NEIGHBOUR] * w.cooc_i[b]


@nb.njit(**INNER)
def _rank(m, w, x, b, dense, rows, o):
    """Ranks the target among all candidates but the user's own; `dense` (rows,): <zC, phi> + <v, e>.

    Returns d ln p_i / d a, the gradient of the calibration.
    """
    target = w.target[b]
    used = x.history_count[b]
    for q in range(used):
        w.skip[w.history[b, q]] = 1
    for q in range(x.seen_start[b], x.seen_start[b + 1]):
        row = find(m.table_key, m.table_row, x.seen[q])
        if row >= 0:
            w.skip[row] = 1
    slope = 0.0
    if w.skip[target] == 0 and m.flags[target] & ACTIVE:
        kept = min(used, w.near_i.shape[1])
        neighbour_scores(m, w.history[b, :kept], w.ck[b, :kept], w.score[:rows])
        weight = f4(1)
        for q in range(kept):
            w.rival_history[q] = weight * m.rec[w.history[b, q]].damping
            weight *= f4(KNN_DECAY)
        neighbour_scores(m, w.history[b, :kept], w.rival_history[:kept], w.rival[:rows])
        slope = _rank_candidates(m, w, x.ts[b], target, dense, rows, o, b)
    for q in range(used):
        w.skip[w.history[b, q]] = 0
    for q in range(x.seen_start[b], x.seen_start[b + 1]):
        row = find(m.table_key, m.table_row, x.seen[q])
        if row >= 0:
            w.skip[row] = 0
    return slope


@nb.njit(**INNER)
def _rank_candidates(m, w, ts, target, dense, rows, o, b):
    """The body of `_rank`: w.score and w.rival hold the co-occurrence sums. Mid-ranks: 1 + #greater + ties / 2."""
    a_k = w.coefficient[b, T_NEIGHBOUR]
    _bias_all(m, rows, ts, w.coefficient[b], w.bias_j, w.popularity)
    top = f4(-1e30)
    for j in range(rows):
        s = w.bias_j[j] + dense[j] + a_k * w.score[j] * m.rec[j].damping
        s = s if (m.flags[j] & ACTIVE != 0) & (w.skip[j] == 0) else f4(-1e30)
        w.score[j] = s
        top = max(top, s)
    sharp = f4(m.scalar[SHARP])
    s_i = w.score[target]
    greater = 0
    ties = 0
    candidates = 0
    mass = 0.0
    mean = 0.0
    for j in range(rows):
        s = w.score[j]
        if s > f4(-1e29):
            candidates += 1
            greater += s > s_i
            ties += s == s_i
            p = np.float64(_exp(sharp * (s - top)))
            mass += p
            mean += p * s
    mean /= mass
    log_loss = 0.0
    raw = 0.0
    for j in range(rows):
        if w.score[j] > f4(-1e29) and j != target:
            log_loss += _miss(np.float64(_exp(sharp * (w.score[j] - top))) / mass)
            raw += np.float64(max(w.score[j], f4(0)) + _log(f4(1) + _exp(-abs(w.score[j]))))
    p_i = np.float64(_exp(sharp * (s_i - top))) / mass
    o.candidates[b] = candidates
    o.rank[b] = 1 + greater + 0.5 * (ties - 1)
    o.probability[b] = p_i
    o.log_loss[b] = log_loss - np.log(max(p_i, 1e-30))
    o.raw_log_loss[b] = raw + np.float64(max(-s_i, f4(0)) + _log(f4(1) + _exp(-abs(s_i))))
    _rank_by_popularity(w, target, rows, candidates, o, b)
    _rank_by_neighbours(m, w, target, rows, o, b)
    listed = np.empty(LISTED, np.int32)
    found = best(w.score[:rows], LISTED, listed)
    o.listed[b] = -1
    o.place[b] = -1
    for q in range(found):
        o.listed[b, q] = np.float64(_exp(sharp * (w.score[listed[q]] - top))) / mass
        if listed[q] == target:
            o.place[b] = q
    return s_i - mean


@nb.njit(**INNER)
def _miss(p):
    """-ln(1 - p)."""
    return -np.log1p(-min(p, 1 - 1e-6)) if p > 1e-3 else p * (1 + 0.5 * p)


@nb.njit(**INNER)
def _rank_by_popularity(w, target, rows, candidates, o, b):
    """The target's mid-rank by each running popularity, among the candidates of w.score, and the log loss of that."""
    for h in range(POPULARITIES):
        count = w.popularity[h]
        greater = 0
        ties = 0
        mass = np.float64(candidates)
        for j in range(rows):
            if w.score[j] > f4(-1e29):
                greater += count[j] > count[target]
                ties += count[j] == count[target]
                mass += np.float64(count[j])
        o.popularity_rank[b, h] = 1 + greater + 0.5 * (ties - 1)
        loss = -np.log((1 + np.float64(count[target])) / mass)
        for j in range(rows):
            if w.score[j] > f4(-1e29) and j != target:
                loss += _miss((1 + np.float64(count[j])) / mass)
        o.popularity_log_loss[b, h] = loss


@nb.njit(**INNER)
def _rank_by_neighbours(m, w, target, rows, o, b):
    """The target's mid-rank by streaming item-kNN (Sarwar et al. 2001; Deshpande, Karypis 2004) over the learner's own
    counts, nothing in it learnt: sum_q .65^q sqrt(C_kj) / ((c_k + 1)(c_j + 1))^.2, and popularity where that is 0."""
    prior = w.popularity[KNN_POPULARITY]
    own = w.rival[target] * m.rec[target].damping + f4(KNN_PRIOR) * prior[target]
    greater = 0
    ties = 0
    for j in range(rows):
        if w.score[j] > f4(-1e29) and j != target:
            s = w.rival[j] * m.rec[j].damping + f4(KNN_PRIOR) * prior[j]
            greater += s > own
            ties += s == own
    o.knn_rank[b] = 1 + greater + 0.5 * ties


@nb.njit(**INNER)
def _choose_ranked(m, w, x, steps):
    """Which examples are ranked in full: those asked for, as far as they cost steps.rank_items item scores an example
    on average. By the state and the message alone."""
    credit = m.scalar[RANK_CREDIT]
    for b in range(x.count):
        credit = min(credit + steps.rank_items, np.float64(RANK_CREDIT_EXAMPLES_MAX * steps.rank_items))
        w.ranked[b] = x.ranked[b] and w.go[b] and (steps.rank_items == 0 or credit >= 0)
        if w.ranked[b] and steps.rank_items > 0:
            credit -= m.scalar[ACTIVES]
    m.scalar[RANK_CREDIT] = credit


@nb.njit(**INNER)
def _dense_scores(m, w, x, b, rows):
    """<zC, phi_j> + <v, e_j> of every row for the next ranked examples from b on, into w.dense; returns how many.

    One product for several users: phi and e do not change inside a message.
    """
    most = max(1, len(w.dense) // rows)
    chosen = 0
    for r in range(b, x.count):
        if w.ranked[r] and chosen < most:
            chosen += 1
    dim = m.phi.shape[1]
    z = np.empty((chosen, dim), np.float32)
    v = np.empty((chosen, m.e.shape[1]), np.float32)
    at = 0
    for r in range(b, x.count):
        if w.ranked[r] and at < chosen:
            z[at] = w.user[r, :dim]
            v[at] = w.user[r, dim:]
            at += 1
    dense = np.dot(z, m.phi[:rows].T) + np.dot(v, m.e[:rows].T)
    for r in range(chosen):
        w.dense[r * rows : (r + 1) * rows] = dense[r]
    return chosen


@nb.njit(**INNER)
def _example_side(m, w, x, steps, o, rows, count, entry_row, entry_at, entry_ts, entries, record_bytes):
    """Example by example, never stale: entries, ranking, the target's score, counters. Returns the slope of ln p."""
    feature = np.empty((FEATURES, 1), np.float32)
    done = 0
    ready = 0
    taken = 0
    slope = 0.0
    for b in range(x.count):
        m.scalar[CLOCK] = max(m.scalar[CLOCK], x.ts[b])
        block = b // steps.refresh
        if b % steps.refresh == 0:
            _feature_candidates(m, w.cand[:count], x.ts[b], w.column, w.feature[block])
        while done < entries and entry_at[done] <= 2 * b:
            row = entry_row[done]
            activate(m, row, entry_ts[done])
            mark(m, row, DIRTY_DENSE | DIRTY_STATIC, record_bytes)
            if w.slot[row] > 0:
                bias_of(m, row, x.ts[b], m.theta, feature)
                w.feature[block, :, w.slot[row] - 1] = feature[:, 0]
            done += 1
        used = x.history_count[b]
        _find_target(m, w, w.target[b], w.history[b, : min(used, max(COUNTED, steps.cooccurrence_history))])
        if w.go[b]:
            if w.ranked[b]:
                if taken == ready:
                    ready = _dense_scores(m, w, x, b, rows)
                    taken = 0
                slope += _rank(m, w, x, b, w.dense[taken * rows : (taken + 1) * rows], rows, o)
                taken += 1
            _neighbours(m, w, x, b, steps, count)
            w.score_i[b] = _target_score(m, w, x, b)
        _count_event(
            m, w, w.target[b], x.label[b] == 1, x.ts[b], w.history[b, :used], x.history_ts[b, :used], steps.backward,
            record_bytes,
        )  # fmt: skip
    while done < entries:
        activate(m, entry_row[done], entry_ts[done])
        mark(m, entry_row[done], DIRTY_DENSE | DIRTY_STATIC, record_bytes)
        done += 1
    return slope


@nb.njit(**INNER)
def _close(w, row, g, logit):
    """The row is no negative of this example."""
    if w.slot[row] > 0:
        g[w.slot[row] - 1] = 0
        logit[w.slot[row] - 1] = f4(CLOSED)


@nb.njit(**INNER)
def _loss(m, w, x, at, steps, count, named, score, weight, entry_row, entry_at):
    """Softmax cross-entropy: turns the scores (n, count) of the candidates, for the examples `at`, into g_j, fills
    w.grad_i.

    weight: n / K of each candidate but the first `named`, which weigh 1. The target, the carried history and items
    that enter later are no negatives.
    """
    for a in range(len(at)):
        b = at[a]
        g = score[a]
        logit = w.logit[b]
        cooc = w.cooc[b]
        bias = w.bias
        bias[:count] = w.beta[:count]
        _add_bias(w.feature[b // steps.refresh], count, w.coefficient[b], bias)
        a_k = w.coefficient[b, T_NEIGHBOUR]
        top = w.score_i[b]
        for c in range(count):
            g[c] += bias[c] + a_k * cooc[c]
            logit[c] = g[c]
            top = max(top, g[c])
        for c in range(count):
            g[c] = _exp(g[c] - top) * weight
        for c in range(named):
            g[c] /= weight
            logit[c] -= np.log(weight)
        _close(w, w.target[b], g, logit)
        for q in range(len(entry_row)):
            if entry_at[q] > 2 * b:
                _close(w, entry_row[q], g, logit)
        for q in range(x.history_count[b]):
            _close(w, w.history[b, q], g, logit)
        own = _exp(w.score_i[b] - top)
        mass = own
        for c in range(count):
            mass += g[c]
        scale = f4(-1) / mass
        for c in range(count):
            g[c] *= scale
        w.grad_i[b] = f4(1) + own * scale
        m.scalar[LOSS] -= np.log(max(1e-30, np.float64(own / mass)))
        m.scalar[LOSSES] += 1


@nb.njit(**INNER)
def _history_gradients(m, w, x, b, steps, count, g, dz, touched):
    """Gradients that reach the history: y_k (into step_y), om, ta, oK, tK, aK. Returns rows of step_y in use."""
    theta = m.theta
    a_k = w.coefficient[b, T_NEIGHBOUR]
    g_i = w.grad_i[b]
    used = x.history_count[b]
    total = g_i * w.cooc_i[b]
    for c in range(count):
        total += g[c] * w.cooc[b, c]
    for c in range(count):
        w.weight_c[c] = g[c] * w.damping[c]
    w.slope[b, T_NEIGHBOUR] = total
    for q in range(min(used, steps.cooccurrence_history)):
        k = w.history[b, q]
        slope = g_i * w.damping_i[b] * w.near_i[b, q]
        n = w.linked[k] - 1
        for r in range(u8(w.link_start[n]), u8(w.link_start[n + 1])):
            slope += w.weight_c[w.link_slot[r]] * w.link_value[r]
        slope *= m.rec[k].damping * w.norm_k[b] * x.history_weight[b, q] * a_k
        a = w.age[b, q]
        gap = w.gap[b, q]
        w.theta[T_AGE_K + a] += slope * theta[T_GAP_K + gap]
        w.theta[T_GAP_K + gap] += slope * theta[T_AGE_K + a]
    for q in range(used):
        k = w.history[b, q]
        y = m.y[k]
        slope = f4(0)
        for d in range(len(dz)):
            slope += dz[d] * y[d]
        if q < steps.y_history:
            if w.slot_y[k] == 0:
                w.row_y[touched] = k
                w.step_y[touched] = 0
                touched += 1
                w.slot_y[k] = touched
            step = w.step_y[w.slot_y[k] - 1]
            wt = w.wt[b, q]
            for d in range(len(dz)):
                step[d] += wt * dz[d]
        slope *= w.norm[b] * x.history_weight[b, q]
        a = w.age[b, q]
        gap = w.gap[b, q]
        w.theta[T_AGE + a] += slope * theta[T_GAP + gap]
        w.theta[T_GAP + gap] += slope * theta[T_AGE + a]
    return touched


@nb.njit(**INNER)
def _map_gradients(m, w, x, at, steps, users):
    """Steps M; completes the gradients of the users of the examples `at` in users (n, D + T), sum_j g_j phi_j | sum_j
    g_j e_j: by the targets' e, for zC by what reaches it through M, for the texts by the metric."""
    dim = m.phi.shape[1]
    for a in range(len(at)):
        b = at[a]
        for d in range(m.e.shape[1]):
            users[a, dim + d] += w.grad_i[b] * m.e[w.target[b], d]
    texts = np.ascontiguousarray(users[:, dim:])
    users[:, :dim] += np.dot(texts, m.map[:dim].T)
    users[:, dim:] = _adapted_by_arm(m, x, at, texts)
    unit = w.unit[: len(at)]
    used = 4 * dim if np.any(unit[:, 3 * dim : 4 * dim]) else 3 * dim
    step = np.empty((used + 1, m.e.shape[1]), np.float32)
    np.dot(np.ascontiguousarray(unit[:, :used]).T, texts, step[:used])
    step[used] = texts.sum(axis=0)
    for r in range(used + 1):
        u = r if r < used else 4 * dim
        total = f4(0)
        for d in range(step.shape[1]):
            total += step[r, d] * step[r, d]
        if total == 0:
            continue
        m.map_square[u] += total / f4(step.shape[1])
        rate = f4(steps.lr_map) / np.sqrt(m.map_square[u])
        for d in range(step.shape[1]):
            m.map[u, d] += rate * step[r, d]
        m.map_dirty[u // dim] = 1


@nb.njit(**INNER)
def _coefficient_gradients(m, w, x, b, steps, count, g, text):
    """Gradients of the example's coefficients, into the three vectors that they are the sum of. text: (T,)."""
    slope = w.slope[b]
    for q in range(FEATURES):
        feature = w.feature[b // steps.refresh, q]
        total = w.grad_i[b] * w.feature_i[b, q, 0]
        for c in range(count):
            total += g[c] * feature[c]
        slope[q] = total
    for h in range(TEXT_HEADS):
        total = f4(0)
        for d in range(len(text)):
            total += text[d] * w.text[b, h, d]
        slope[T_TEXT + h] = total
    for q in range(COEFFICIENTS):
        w.theta[q] += slope[q]
        w.theta[T_SINCE + w.since[b] * COEFFICIENTS + q] += slope[q]
        w.theta[T_LENGTH + w.length[b] * COEFFICIENTS + q] += slope[q]


@nb.njit(**INNER)
def _gradients(m, w, x, at, steps, count, g):
    """Sums the message's gradients, and steps M; g (n, count) of the examples `at`. Returns (rows of step_phi, rows of
    step_y)."""
    dim = m.phi.shape[1]
    users = np.dot(g, w.item[:count])
    items = np.dot(g.T, w.z[at])  # (count, D)
    w.theta[:] = 0
    w.step_beta[:count] = 0
    w.step_context[:] = 0
    for a in range(len(at)):
        for c in range(count):
            w.step_beta[c] += g[a, c]
    for c in range(count):
        w.row_phi[c] = w.cand[c]
        w.step_phi[c] = items[c]
    touched = count
    touched_y = 0
    _map_gradients(m, w, x, at, steps, users)
    for a in range(len(at)):
        b = at[a]
        target = w.target[b]
        g_i = w.grad_i[b]
        if w.slot[target] == 0:
            w.row_phi[touched] = target
            w.step_phi[touched] = 0
            w.step_beta[touched] = 0
            touched += 1
            w.slot[target] = touched
        own = w.slot[target] - 1
        w.step_beta[own] += g_i
        dz = users[a, :dim]
        for d in range(dim):
            w.step_phi[own, d] += g_i * w.z[b, d]
            dz[d] += g_i * m.phi[target, d]
            w.step_context[w.since[b], d] += dz[d]
            w.step_context[SINCES + w.length[b], d] += dz[d]
        touched_y = _history_gradients(m, w, x, b, steps, count, g[a], dz, touched_y)
        _coefficient_gradients(m, w, x, b, steps, count, g[a], users[a, dim:])
    return touched, touched_y


@nb.njit(**INNER)
def _step_rows(m, w, steps, touched, touched_y, record_bytes):
    """One AdaGrad step a touched row: G += mean(d^2), x += lr d / sqrt(G)."""
    dim = m.phi.shape[1]
    for slot in range(touched):
        row = w.row_phi[slot]
        d = w.step_phi[slot]
        r = m.rec[row]
        total = f4(0)
        for a in range(dim):
            total += d[a] * d[a]
        r.square_phi += total / f4(dim)
        rate = f4(steps.lr_phi) / np.sqrt(r.square_phi)
        phi = m.phi[row]
        for a in range(dim):
            phi[a] += rate * d[a]
        r.square_beta += w.step_beta[slot] * w.step_beta[slot]
        r.beta += f4(steps.lr_beta) * w.step_beta[slot] / np.sqrt(r.square_beta)
        mark(m, row, DIRTY_DENSE, record_bytes)
    for slot in range(touched_y):
        row = w.row_y[slot]
        w.slot_y[row] = 0
        d = w.step_y[slot]
        r = m.rec[row]
        total = f4(0)
        for a in range(dim):
            total += d[a] * d[a]
        r.square_y += total / f4(dim)
        rate = f4(steps.lr_y) / np.sqrt(r.square_y)
        y = m.y[row]
        for a in range(dim):
            y[a] += rate * d[a]
        mark(m, row, DIRTY_DENSE, record_bytes)
    for c in range(CONTEXTS):
        d = w.step_context[c]
        total = f4(0)
        for a in range(dim):
            total += d[a] * d[a]
        m.context_square[c] += total / f4(dim)
        rate = f4(steps.lr_context) / np.sqrt(m.context_square[c])
        for a in range(dim):
            m.context[c, a] += rate * d[a]


@nb.njit(**INNER)
def _step_scalars(m, w, steps):
    """The same of theta; what is told apart by setting (T_SINCE, T_LENGTH) has no gain of its own."""
    for q in range(THETA):
        d_q = w.theta[q]
        if d_q == 0:
            continue
        m.square[q] += d_q * d_q
        step = d_q / np.sqrt(m.square[q])
        if q < COEFFICIENTS:
            if step * m.course[q] > 0:
                m.gain[q] = min(f4(GAIN_MAX), m.gain[q] + f4(GAIN_STEP))
            elif step * m.course[q] < 0:
                m.gain[q] = max(f4(GAIN_MIN), m.gain[q] * f4(1 - 2 * GAIN_STEP))
            m.course[q] = f4(COURSE_DECAY) * m.course[q] + f4(1 - COURSE_DECAY) * step
            m.theta[q] += f4(steps.lr_scale) * m.gain[q] * step
        elif q < T_SINCE:
            m.theta[q] = max(f4(0), m.theta[q] + f4(steps.lr_decay) * step)
        else:
            m.theta[q] += f4(steps.lr_setting) * step


@nb.njit(**RELEASING)
def learn_messages(m, w, xs, outcomes, steps, count, positions, entry_row, entry_at, entry_ts, record_bytes):
    """The first `count` of the messages xs, one micro-batch after another; w.targets and w.histories hold rows. The
    entries are of the first: rows that become candidates inside it, before example b (entry_at 2 b) or right after it
    (2 b + 1), in order.

    Returns (examples with a gradient, candidates, what each of them weighs that is not a target) of the last message.
    The body is no kernel of its own: the compiler would take half a minute more for the copy that is not inlined.
    """
    learnt = 0
    drawn = 0
    weight = f4(0)
    for n in range(count):
        x = xs[n]
        if x.count == 0:
            continue
        w.target[:] = w.targets[n]
        w.history[:] = w.histories[n]
        rows = np.int64(m.scalar[ROWS])
        if m.scalar[CLOCK] < 0:
            m.scalar[FIRST_TS] = max(0.0, x.ts[0])
        m.scalar[MESSAGES] += 1
        entries = len(entry_row)
        for q in range(entries):
            m.flags[entry_row[q]] |= ENTERING
        candidates = m.scalar[ACTIVES] + entries
        drawn, named = _draw(m, w, x, steps, rows, candidates, positions[n])
        at = _user_side(m, w, x, steps, entry_row, entry_at, entries)
        _gather(m, w, drawn)
        linked = _link(m, w, x, at, steps)
        _choose_ranked(m, w, x, steps)
        slope = _example_side(
            m, w, x, steps, outcomes[n], rows, drawn, entry_row, entry_at, entry_ts, entries, record_bytes
        )
        learnt = len(at)
        touched = drawn
        weight = f4((candidates - named) / max(1, drawn - named))
        if learnt > 0 and drawn > 0:
            score = np.dot(w.user[at], w.item[:drawn].T)
            _loss(m, w, x, at, steps, drawn, named, score, weight, entry_row, entry_at)
            touched, touched_y = _gradients(m, w, x, at, steps, drawn, score)
            _step_rows(m, w, steps, touched, touched_y, record_bytes)
            _step_scalars(m, w, steps)
        else:
            w.row_phi[:drawn] = w.cand[:drawn]
        for slot in range(touched):
            w.slot[w.row_phi[slot]] = 0
        for k in range(linked):
            w.linked[w.link_row[k]] = 0
        if slope != 0:
            m.scalar[SHARP_SQUARE] += slope * slope
            m.scalar[SHARP] += steps.lr_sharp * slope / np.sqrt(m.scalar[SHARP_SQUARE])
            m.scalar[SHARP] = max(0.05, m.scalar[SHARP])
        entry_row = entry_row[:0]
    return learnt, drawn, weight


# --- replicas -----------------------------------------------------------------------------------------------------


@nb.njit(**RELEASING)
def apply_neighbours(m, words, values, starts, sizes):
    """Neighbour rows into the matrix: words, values are one buffer as int32 and as float32; starts, sizes in words."""
    for q in range(len(starts)):
        at = starts[q] + 4
        row = words[starts[q] + 1]
        n = (sizes[q] - 4) // 2
        m.length[row] = n
        for r in range(n):
            m.neighbour[row, r] = words[at + r]
            m.weight[row, r] = values[at + n + r]


# --- ranking ------------------------------------------------------------------------------------------------------


@nb.njit(**RELEASING)
def score_rows(m, rows, history, ck, z, v, coefficient, feature, excluded, out):
    """s_j of every row into out (rows,); CLOSED where it is no candidate or excluded (keys). feature: (FEATURES, N).

    Returns (sum_j exp(a (s_j - top)), top).
    """
    neighbour_scores(m, history, ck, out)
    a_k = coefficient[T_NEIGHBOUR]
    for j in range(rows):
        out[j] = m.rec[j].beta + a_k * out[j] * m.rec[j].damping
    _add_bias(feature, rows, coefficient, out)
    for j in range(rows):
        phi = m.phi[j]
        learnt = f4(0)
        for d in range(len(z)):
            learnt += phi[d] * z[d]
        e = m.e[j]
        text = f4(0)
        for d in range(len(v)):
            text += e[d] * v[d]
        s = out[j] + learnt + text
        out[j] = s if m.flags[j] & ACTIVE else f4(CLOSED)
    for q in range(len(excluded)):
        row = find(m.table_key, m.table_row, excluded[q])
        if row >= 0:
            out[row] = f4(CLOSED)
    top = f4(CLOSED)
    for j in range(rows):
        top = max(top, out[j])
    sharp = f4(m.scalar[SHARP])
    mass = 0.0
    for j in range(rows):
        mass += _exp(sharp * max(f4(-80), out[j] - top)) if out[j] > f4(CLOSED) else f4(0)
    return mass, top


@nb.njit(**RELEASING)
def best(score, k, rows):
    """The k highest scores' indices into rows (k,), best first, ties to the lower index; CLOSED ones never.

    Returns how many there are.
    """
    held = np.empty(k, np.float32)
    count = 0
    least = f4(CLOSED)
    for j in range(len(score)):
        s = score[j]
        if s <= least:
            continue
        at = count if count < k else k - 1
        count = min(k, count + 1)
        while at > 0 and held[at - 1] < s:
            held[at] = held[at - 1]
            rows[at] = rows[at - 1]
            at -= 1
        held[at] = s
        rows[at] = j
        if count == k:
            least = held[k - 1]
    return count


@nb.njit(**OPTIONS)
def text_sides(m, metric, rows, head, weight):
    """(n, T): what a text head's vector (zT_h, or zX: 2), multiplied with it, adds to the score of n rows, through the
    texts (times weight, by the user's metric) and through M."""
    dim = m.project.shape[0]
    e = m.e[rows]
    lifted = np.dot(np.dot(e, m.map[dim * (1 + head) : dim * (2 + head)].T), m.project)
    return f4(weight) * adapted(metric, e) + f4(np.sqrt(m.project.shape[1] / dim)) * lifted


@nb.njit(**OPTIONS)
def term_heads(m, metric, rows, history, near, wt, ck, text_coefficient, coefficient, out):
    """(3, n, m'), zeros before: what each entry of the history adds to the score of n rows through the learnt, the
    co-occurrence and the text heads, in logits. near: entries in the co-occurrence block."""
    dim = m.project.shape[0]
    learnt = m.phi[rows] + np.dot(m.e[rows], m.map[:dim].T)
    out[0] = np.dot(learnt, m.y[history].T) * wt
    for q in range(min(near, len(history))):
        k = history[q]
        x = ck[q] * coefficient[T_NEIGHBOUR]
        for r in range(m.length[k]):
            j = m.neighbour[k, r]
            for a in range(len(rows)):
                if rows[a] == j:
                    out[1, a, q] = x * m.rec[j].damping * np.sqrt(m.weight[k, r])
    texts = m.e[history] - m.mu
    for h in range(len(text_coefficient)):
        out[2] += np.dot(text_sides(m, metric, rows, h, coefficient[T_TEXT + h]), texts.T) * text_coefficient[h]
    out *= f4(m.scalar[SHARP])
