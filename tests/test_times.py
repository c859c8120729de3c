import jax
import numpy as np
import pytest
from scipy import stats

from jflow import times

N = 4096
# the false-alarm rate of each Kolmogorov-Smirnov test, were the seed not fixed
ALARM = 1e-3


@pytest.mark.parametrize(
    ("time", "cdf"),
    [
        (times.uniform(), stats.uniform().cdf),
        (times.uniform(0.2, 0.7), stats.uniform(0.2, 0.5).cdf),
        (times.logit_normal(), lambda t: stats.norm().cdf(np.log(t / (1 - t)))),
        (times.logit_normal(1.0, 0.5), lambda t: stats.norm(1.0, 0.5).cdf(np.log(t / (1 - t)))),
    ],
    ids=["uniform", "part", "logit", "shifted"],
)
def test_times_follow_their_law(time, cdf):
    t = np.asarray(time(jax.random.key(0), N))
    assert t.shape == (N,) and t.min() >= 0 and t.max() <= 1
    assert stats.kstest(t.astype(np.float64), cdf).pvalue > ALARM


def test_a_positive_mean_is_near_data():
    t = times.logit_normal(1.0, 0.5)(jax.random.key(0), N)
    assert t.mean() > 0.65  # t=1 is data; the median is sigmoid(1) = 0.73


def test_errors():
    for low, high in [(0.5, 0.5), (0.6, 0.2), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)]:
        with pytest.raises(ValueError, match="0 <= low < high <= 1"):
            times.uniform(low, high)
    for mean, std in [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))]:
        with pytest.raises(ValueError, match="std > 0"):
            times.logit_normal(mean, std)
