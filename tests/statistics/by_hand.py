# ruff: noqa
"""The rule of page 07, implemented by somebody who has not seen the code, from the words and formulas that it prints.

What the words left open at first became switches, and then sentences of the page; they stand as those sentences say.
"""

import numpy as np
from scipy import stats

# Readings the words leave open (see report)
Z = 1.6448536269514722
BALANCE_PER_SUBSET = False  # False: accuracy/balanced accuracy chosen on all rows, once
S_WITHIN_WEIGHT = True  # s counts only the rows of that weight in a group (False: whole group)
COUNT_ZERO_GROUPS = False  # groups whose sum is 0 count among the sign patterns
FEW_LEAK_FREE = "none"  # < 20 leak-free groups: "fail" (not good enough) | "none" (no verdict) | "ignore"
FOLDS_ANEW = True  # leak-free rows: k is the folds that occur among them (False: the folds of all rows)
FOLDS_REFERENCE = False  # the reference's own interval of perplexity is widened by its folds too
MIN_GROUPS, DRAWS, ALPHA = 20, 9999, 0.05


# ---------------------------------------------------------------- shared
def _index(groups):
    return np.unique(np.asarray(groups), return_inverse=True)[1].ravel()


def _holm(p):
    p = np.asarray(p, float)
    out, run = np.empty(len(p)), 0.0
    for i, j in enumerate(np.argsort(p, kind="stable")):
        run = max(run, min(1.0, (len(p) - i) * p[j]))
        out[j] = run
    return out


def _fold_factor(v, share, means, mean, k):
    """1 + max(0, S2 - k v) (1 / k + 1 / (k - 1)) / v, of each fold's share of all and its mean."""
    if v == 0 or k < 2:
        return 1.0
    s2 = k / (k - 1) * (share * (means - mean) ** 2).sum()
    return float(1 + max(0.0, s2 - k * v) * (1 / k + 1 / (k - 1)) / v)


def _per_fold(x, w, fold):
    """Every fold's share of w and its mean: sum of w x over sum of w, of the folds that occur."""
    i = _index(fold)
    total = np.bincount(i, w)
    return total / total.sum(), np.bincount(i, w * x) / total


def _folds_of(folds, keep):
    """Folds of the kept rows, and k."""
    if folds is None:
        return None, None
    some = folds if keep is None else folds[keep]
    return some, len(np.unique(some if FOLDS_ANEW else folds))


def _decide(sizes, limits, losses, ps, margin, judged, n_leak_groups):
    """n_leak_groups: None without leak-free marks."""
    names = list(limits)
    few = n_leak_groups is not None and n_leak_groups < MIN_GROUPS
    if few and FEW_LEAK_FREE == "none":
        judged = False
    if not judged:
        return dict(no_verdict=True, limits=limits, recommended=None, verdicts={f: "no verdict" for f in names})
    good, best = set(), None
    for f in sorted(names, key=lambda f: -sizes[f]):  # ties: order given
        ok = limits[f][0] < margin
        if n_leak_groups is not None:
            if few:
                ok = ok and FEW_LEAK_FREE == "ignore"
            else:
                ok = ok and limits[f][1] is not None and limits[f][1] < margin
        if not ok:
            break
        good.add(f)
        best = f
    adj = dict(zip(names, _holm([ps[f] for f in names])))
    verdicts = {}
    for f in names:
        if f in good:
            verdicts[f] = "good enough"  # even if a small loss is certain
        elif adj[f] < ALPHA and losses[f] > 0:
            verdicts[f] = "worse"
        else:
            verdicts[f] = "not shown"
    return dict(no_verdict=False, limits=limits, recommended=best, verdicts=verdicts)


# ---------------------------------------------------------------- labels
def _imbalanced(truth):
    c = np.unique(truth, return_counts=True)[1]
    return c.max() > 1.5 * c.min()


def _weights(truth, balanced):
    n = len(truth)
    if not balanced:
        return np.ones(n)
    _, inv, c = np.unique(truth, return_inverse=True, return_counts=True)
    return n / (len(c) * c[inv.ravel()])


def _b(w, grp):
    whole, best = np.bincount(grp), 1.0
    key = np.round(w, 12)
    for v in np.unique(key):
        rows = key == v
        s = np.bincount(grp[rows], minlength=len(whole)).astype(float)
        if not S_WITHIN_WEIGHT:
            s = np.where(s > 0, whole, 0).astype(float)
        best = max(best, w[rows][0] * (s**2).sum() / s.sum())
    return best


def _design(d, w, grp):
    n, g = len(d), grp.max() + 1
    if g == n and np.allclose(w, 1, atol=1e-12):
        return 1.0
    if g == 1:
        return float(n)
    m = (w * d).sum() / n
    r = n / (n - 1) * (w * (d - m) ** 2).sum()
    dev = np.bincount(grp, w * d) - m * np.bincount(grp, w)
    v = g / (g - 1) * (dev**2).sum()
    b = _b(w, grp)
    return max(1.0, (4 * b * b + v) / (4 * b + r))


def _spread(d, w, grp):
    """m, and v of it over groups."""
    n, g = len(d), grp.max() + 1
    m = (w * d).sum() / n
    dev = np.bincount(grp, w * d) - m * np.bincount(grp, w)
    return m, (g / (g - 1) * (dev**2).sum() / n**2 if g > 1 else 0.0)


def _label_factor(d, w, grp, fold, k):
    if fold is None:
        return 1.0
    m, v = _spread(d, w, grp)
    return _fold_factor(v, *_per_fold(d, w, fold), m, k)


def _p_student(d, w, grp, fold, k):
    """Student's two-sided test of m over the root of v times the factor of folds."""
    m, v = _spread(d, w, grp)
    if m == 0:
        return 1.0
    if v == 0:
        return 0.0
    return float(2 * stats.t.sf(abs(m) / np.sqrt(v * _label_factor(d, w, grp, fold, k)), grp.max()))


def _q(delta, l, k, n):
    a, b, c = 2 * n, delta * (2 * n + l - k) - l - k, -l * delta * (1 - delta)
    return (-b + np.sqrt(np.maximum(b * b - 4 * a * c, 0))) / (2 * a)


def _z(delta, l, k, n):
    x = k - l - n * delta
    var = n * (2 * _q(delta, l, k, n) + delta - delta**2)
    num = np.sign(x) * np.maximum(0, np.abs(x) - 0.25)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(num == 0, 0.0, num / np.sqrt(np.maximum(var, 0)))


def tango_limit(l, k, n):
    """-100 delta with z(delta) = Z, -1 <= delta < (k-l)/n; 100 where there is none.
    Own way: walk down from the estimate on ever finer grids (nearest crossing)."""
    hi, lo = (k - l) / n, -1.0
    if hi <= lo:
        return 100.0
    for step in range(14):
        grid = np.linspace(hi, lo, 65)
        z = _z(grid, l, k, n)
        over = np.flatnonzero(z >= Z)
        if len(over) == 0:
            if step == 0:
                # z grows without bound at -1 whenever x there exceeds a quarter row
                return 100.0
            break
        i = max(over[0], 1)
        hi, lo = grid[i - 1], grid[i]
        if hi - lo < 1e-15:
            break
    return -100.0 * (hi + lo) / 2


def _limit(ref, ans, truth, grp, balanced, fold=None, k=None):
    w = _weights(truth, balanced)
    d = (ans == truth).astype(int) - (ref == truth).astype(int)
    if len(d) > 1 and grp.max() == 0:
        return 100.0
    D = _design(d, w, grp) * _label_factor(d, w, grp, fold, k)
    if fold is not None and D >= len(d) > 1:
        return 100.0
    return float(tango_limit(w[d == -1].sum() / D, w[d == 1].sum() / D, len(d) / D))


def _mcnemar(lost, won):
    n = lost + won
    return 1.0 if n == 0 else min(1.0, 2 * stats.binom.cdf(min(lost, won), n, 0.5))


def _exchange(x, grp, rng):
    s = np.bincount(grp, x)
    seen = abs(s.sum()) - 1e-9
    if not COUNT_ZERO_GROUPS:
        s = s[np.abs(s) > 1e-12]
    if len(s) == 0:
        return 1.0
    if len(s) <= 13 and 2 ** len(s) <= DRAWS:
        bits = (np.arange(2 ** len(s))[:, None] >> np.arange(len(s))) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ s) >= seen))
    hits = 0
    for start in range(0, DRAWS, 1000):
        many = min(1000, DRAWS - start)
        hits += int((np.abs((2.0 * rng.integers(0, 2, (many, len(s))) - 1) @ s) >= seen).sum())
    return (1 + hits) / (1 + DRAWS)


def _p_labels(ref, ans, truth, grp, balanced, seed=0, fold=None, k=None):
    p = _p_without_folds(ref, ans, truth, grp, balanced, seed)
    if fold is None:
        return p
    d = (ans == truth).astype(int) - (ref == truth).astype(int)
    return max(p, _p_student(d, _weights(truth, balanced), grp, fold, k))


def _p_without_folds(ref, ans, truth, grp, balanced, seed=0):
    d = (ans == truth).astype(int) - (ref == truth).astype(int)
    rng = np.random.default_rng(seed)
    if balanced:
        return _exchange(_weights(truth, True) * d, grp, rng)
    p = _mcnemar(int((d == -1).sum()), int((d == 1).sum()))
    return max(p, _exchange(d, grp, rng)) if grp.max() + 1 < len(d) else p


def wilson_low(p, n):
    z = stats.norm.ppf(0.975)
    return (p + z * z / (2 * n) - z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def _learned(ref, truth, grp, balanced):
    if len(np.unique(ref)) < 2:
        return False
    w, n = _weights(truth, balanced), len(truth)
    c = np.unique(truth, return_counts=True)[1]
    score = min(1.0, (w * (ref == truth)).sum() / n)
    return bool(wilson_low(score, n / _b(w, grp)) > (1 / len(c) if balanced else c.max() / n))


def labels(reference, files, sizes, truth, groups, leak_free, margin, n_labels=None, folds=None):
    """n_labels is not used: K is 'the labels that occur' (in truth). folds: every row's fold, or None."""
    ref, truth, grp = np.asarray(reference), np.asarray(truth), _index(groups)
    balanced = _imbalanced(truth)
    keep = None if leak_free is None else np.asarray(leak_free, bool)
    folds = None if folds is None else np.asarray(folds)
    fold, k = _folds_of(folds, None)
    limits, losses, ps = {}, {}, {}
    w = _weights(truth, balanced)
    for f, a in files.items():
        a = np.asarray(a)
        second = None
        if keep is not None and keep.any():
            t = truth[keep]
            bal = _imbalanced(t) if BALANCE_PER_SUBSET else balanced
            second = _limit(ref[keep], a[keep], t, _index(grp[keep]), bal, *_folds_of(folds, keep))
        limits[f] = [_limit(ref, a, truth, grp, balanced, fold, k), second]
        losses[f] = (w * ((ref == truth).astype(int) - (a == truth))).sum()
        ps[f] = _p_labels(ref, a, truth, grp, balanced, fold=fold, k=k)
    judged = grp.max() + 1 >= MIN_GROUPS and _learned(ref, truth, grp, balanced)
    return _decide(sizes, limits, losses, ps, margin, judged, None if keep is None else len(np.unique(grp[keep])))


# ---------------------------------------------------------------- answers
def _mean_se(x, t, grp, fold=None, k=None):
    """Token-weighted mean of x and its standard error over groups, widened by folds."""
    total, g = t.sum(), grp.max() + 1
    mean = (t * x).sum() / total
    if g < 2:
        return mean, np.inf, g
    dev = np.bincount(grp, t * x) - mean * np.bincount(grp, t)
    se = np.sqrt(g / (g - 1) * (dev**2).sum()) / total
    if fold is not None:
        se *= np.sqrt(_fold_factor(se**2, *_per_fold(x, t, fold), mean, k))
    return mean, se, g


def _answer_limit(x, t, grp, fold=None, k=None):
    mean, se, g = _mean_se(x, t, grp, fold, k)
    return np.inf if g < 2 else float(100 * np.expm1(mean + stats.t.ppf(0.95, g - 1) * se))


def answers(reference, files, sizes, tokens, groups, leak_free, margin, floor=None, folds=None):
    ref, t, grp = np.asarray(reference, float), np.asarray(tokens, float), _index(groups)
    keep = None if leak_free is None else np.asarray(leak_free, bool)
    folds = None if folds is None else np.asarray(folds)
    fold, k = _folds_of(folds, None)
    limits, losses, ps = {}, {}, {}
    for f, a in files.items():
        d = np.asarray(a, float) - ref
        second = None
        if keep is not None and keep.any():
            second = _answer_limit(d[keep], t[keep], _index(grp[keep]), *_folds_of(folds, keep))
        limits[f] = [_answer_limit(d, t, grp, fold, k), second]
        mean, se, g = _mean_se(d, t, grp, fold, k)
        losses[f] = mean
        if g < 2 or mean == 0:
            ps[f] = 1.0
        else:
            ps[f] = 0.0 if se == 0 else float(2 * stats.t.sf(abs(mean) / se, g - 1))
    judged = grp.max() + 1 >= MIN_GROUPS
    if judged and floor is not None:
        mean, se, g = _mean_se(ref, t, grp, *((fold, k) if FOLDS_REFERENCE else ()))
        judged = bool(np.exp(mean + stats.t.ppf(0.975, g - 1) * se) < floor)
    return _decide(sizes, limits, losses, ps, margin, judged, None if keep is None else len(np.unique(grp[keep])))
