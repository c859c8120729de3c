"""Objectives of GFlowNets against programs of numpy over the states of small environments."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jflow
from jflow import gflownets, losses, train
from jflow.types import Field

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
REWARDS = RANDOM.uniform(0.3, 3.0, (3, 3))
GRID = gflownets.hypergrid(
    2, 3, lambda position: jnp.log(jnp.asarray(REWARDS, jnp.float32))[tuple(position.T)]
)
TWO_ENDED = gflownets.two_ended_sequences(
    gflownets.reward_table(RANDOM.uniform(0.3, 3.0, (2, 2, 2))), 3, 2
)
SETS = gflownets.independent_sets(np.eye(5, k=1) + np.eye(5, k=-1), temperature=2.0)
ENVIRONMENTS = {"grid": GRID, "two_ended": TWO_ENDED, "sets": SETS}
DECAY = 0.7


def numbers_of(states):
    """state -> its row in the list of states."""

    def at(state):
        equal = jax.tree.map(
            lambda s, t: jnp.all((s[:, None] == t[None]).reshape(len(s), len(t), -1), axis=-1),
            state,
            jax.tree.map(jnp.asarray, states.states),
        )
        return jnp.argmax(jnp.all(jnp.stack(jax.tree.leaves(equal)), axis=0), axis=1)

    return at


def tabular(environment, at):
    """(an environment whose observations are numbers of states, a policy whose logits and flows
    stand in tables, a potential that does)."""

    def apply(params, state, cond=None, *, key=None):
        rows = jax.tree.map(lambda table: table[at(state)], params["net"])
        return gflownets.PolicyOutput(
            gflownets.masked_log_softmax(rows["forward"], environment.forward_mask(state)),
            gflownets.masked_log_softmax(rows["backward"], environment.backward_mask(state)),
            rows["log_flow"],
        )

    seen = environment._replace(observe=lambda state: at(state).astype(jnp.float32))
    potential = Field(None, lambda params, x, t, cond=None, *, key=None: params[x.astype(int)])
    return seen, gflownets.Policy(None, apply), potential


def log_softmax(logits, mask):
    logits = np.where(mask, logits, -np.inf)
    with np.errstate(all="ignore"):
        return np.where(mask, logits - np.log(np.exp(logits).sum(1, keepdims=True)), -np.inf)


class Tables:
    """The states of an environment, their edges and rewards, for programs of numpy."""

    def __init__(self, environment):
        self.states = gflownets.enumerate_states(environment)
        self.child = self.states.child
        self.row, self.action = np.nonzero(self.child >= 0)
        self.back_mask = np.asarray(environment.backward_mask(self.states.states))
        undo = environment.backward_action(
            jax.tree.map(lambda s: jnp.asarray(s[self.row]), self.states.states),
            jnp.asarray(self.action),
        )
        self.undo = dict(
            zip(zip(self.row, self.action, strict=True), np.asarray(undo), strict=True)
        )
        self.edges = [(s, a, self.child[s, a], b) for (s, a), b in self.undo.items()]
        self.log_reward = np.full(len(self.child), np.nan)
        self.log_reward[self.states.terminal] = self.states.log_reward
        self.stop = environment.stop

    def shapes(self):
        n, actions = self.child.shape
        return {
            "net": {"forward": (n, actions), "backward": self.back_mask.shape, "log_flow": (n,)},
            "log_z": (),
            "potential": (n, actions),
        }

    def exact(self, random, heights):
        """Params of exact flows for a random backward policy, states last to first, and a potential
        that is the difference of heights."""
        backward = random.normal(size=self.back_mask.shape)
        log_b = log_softmax(backward, self.back_mask)
        flow = np.exp(self.log_reward)
        for s in range(len(flow))[::-1]:  # children have larger numbers
            if np.isnan(flow[s]):
                flow[s] = sum(flow[c] * np.exp(log_b[c, b]) for r, _, c, b in self.edges if r == s)
        forward = np.zeros(self.child.shape)
        potential = np.zeros(self.child.shape)
        for s, a, c, b in self.edges:
            forward[s, a] = np.log(flow[c]) + log_b[c, b] - np.log(flow[s])
            potential[s, a] = heights[c] - heights[s]
        net = {"forward": forward, "backward": backward, "log_flow": np.log(flow)}
        return {"net": net, "log_z": np.log(flow[0]), "potential": potential}

    def losses(self, params, paths, given, weight, stopped):
        """Each objective of paths [[(state, action), ...], ...], one step and one part at a time.
        `given` [N] is what is known of the rewards of states; `stopped` are the params without a
        gradient."""
        net = params["net"]
        log_f = log_softmax(net["forward"], self.child >= 0)
        log_b = log_softmax(net["backward"], self.back_mask)
        log_flow = np.where(np.isnan(self.log_reward), net["log_flow"], self.log_reward)
        looking = np.where(np.isnan(self.log_reward), net["log_flow"] + given, self.log_reward)
        learned = np.where(np.isnan(self.log_reward), net["log_flow"], 0)
        values, totals, z = collections.Counter(), collections.Counter(), []

        def add(name, error, w):
            values[name] += w * error
            totals[name] += w

        for path, w in zip(paths, weight, strict=True):
            ends = [s for s, _ in path] + [self.child[path[-1]]]
            ratio = [log_f[s, a] - log_b[self.child[s, a], self.undo[s, a]] for s, a in path]
            reward = self.log_reward[ends[-1]]
            add("tb", (params["log_z"] + sum(ratio) - reward) ** 2, w)
            z.append(reward - sum(ratio))
            for name, flow in (("sub", log_flow), ("looking_sub", looking)):
                top = bottom = 0.0
                for i in range(len(path)):
                    for j in range(i + 1, len(path) + 1):
                        error = flow[ends[i]] + sum(ratio[i:j]) - flow[ends[j]]
                        top, bottom = top + DECAY ** (j - i) * error**2, bottom + DECAY ** (j - i)
                add(name, top / bottom, w)
            q = [params["potential"][s, a] for s, a in path]
            add("led", (sum(q) - reward) ** 2, w)
            p = [stopped["potential"][s, a] for s, a in path]
            p = [one + (reward - sum(p)) / len(p) for one in p]
            for step, (s, a) in enumerate(path):
                c = self.child[s, a]
                add("db", (log_flow[s] + ratio[step] - log_flow[c]) ** 2, w)
                add("looking", (looking[s] + ratio[step] - looking[c]) ** 2, w)
                add("led steps", (learned[s] + ratio[step] - learned[c] - p[step]) ** 2, w)
                inflow = [log_flow[r] + log_f[r, e] for r, e, end, _ in self.edges if end == c]
                add("flow", (np.log(np.exp(inflow).sum()) - log_flow[c]) ** 2, w)
                if self.stop is not None and a != self.stop:
                    error = given[s] - log_f[s, self.stop] + ratio[step]
                    add("modified", (error - given[c] + log_f[c, self.stop]) ** 2, w)
        found = {name: values[name] / totals[name] for name in values}
        found["led"] += found.pop("led steps")
        found["variance"] = np.average((z - np.average(z, weights=weight)) ** 2, weights=weight)
        return found


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_zero_for_exact_flows_and_elsewhere_what_numpy_says_with_its_gradient(name):
    """The exact flows are those of a program of numpy. Values agree to 1e-4 of float32 sums of up
    to 15 squares of order 1, slopes along a random direction with central differences in float64;
    rows have weights and several lengths."""
    environment, random = ENVIRONMENTS[name], np.random.default_rng(7)
    tables = Tables(environment)
    n = len(tables.child)
    given = np.zeros(n)  # of the first state, for which a potential gathers nothing
    given[1:] = random.normal(size=n - 1)
    if name == "grid":  # where states can stop, the reward of a stop
        position = tables.states.states["position"]
        given = np.log(REWARDS)[tuple(position.T)]
    heights = np.where(np.isnan(tables.log_reward), given, tables.log_reward)
    heights[0] = 0
    at_state = numbers_of(tables.states)
    seen, policy, potential = tabular(environment, at_state)
    known = lambda state: jnp.asarray(given, jnp.float32)[at_state(state)]  # noqa: E731

    made = {
        "tb": losses.trajectory_balance(policy),
        "variance": losses.log_partition_variance(policy),
        "db": losses.detailed_balance(policy),
        "sub": losses.sub_trajectory_balance(policy, decay=DECAY),
        "looking": losses.forward_looking(policy, known),
        "looking_sub": losses.forward_looking(
            policy, known, lambda policy: losses.sub_trajectory_balance(policy, decay=DECAY)
        ),
        "led": losses.learned_energy_decomposition(seen, policy, potential, keep=1.0),
        "flow": losses.gfn_flow_matching(environment, policy),
    }
    if name == "grid":
        made["modified"] = losses.modified_detailed_balance(environment, policy)
    weight = np.array([1, 2, 0.5, 1, 0, 3, 1, 1], np.float32)

    @jax.jit
    def run(params, direction, batch):
        return {
            loss: jax.jvp(
                lambda p, f=f: f(p, jax.random.clone(KEY), batch)[0], (params,), (direction,)
            )
            for loss, f in made.items()
        }

    draw = jax.jit(lambda p: gflownets.rollout(environment, policy, p, KEY, len(weight)))
    shapes = tables.shapes()
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    normal = lambda s: random.normal(size=s)  # noqa: E731
    other, direction = (jax.tree.map(normal, shapes, is_leaf=is_shape) for _ in range(2))
    single = lambda tree: jax.tree.map(np.float32, tree)  # noqa: E731
    rows = jax.device_get(draw(single(other)))
    batch = rows._asdict() | {"weight": weight}
    assert len(set(rows.valid.sum(1).tolist())) > 1 or name == "two_ended"

    exact = tables.exact(random, heights)
    rewards = np.exp(tables.states.log_reward).sum()
    np.testing.assert_allclose(np.exp(exact["log_z"]), rewards, rtol=1e-6)
    reached = gflownets.exact_distribution(policy, single(exact), tables.states)
    target = gflownets.reward_distribution(tables.states)
    assert gflownets.total_variation(reached, target) < 1e-6
    log_flow = exact["net"]["log_flow"]
    ahead = exact | {"net": exact["net"] | {"log_flow": log_flow - given}}
    spread = exact | {"net": exact["net"] | {"log_flow": log_flow - heights}}
    for params, names in (
        (exact, {"tb", "variance", "db", "sub", "flow", "modified"} & set(made)),
        (ahead, {"looking", "looking_sub"}),
        (spread, {"led"}),
    ):
        found = jax.device_get(run(single(params), single(direction), batch))
        for loss in names:  # squares of rounding, a few 1e-7 each step, and their slopes
            assert found[loss][0] < 1e-10 and abs(found[loss][1]) < 1e-4, loss
    found = jax.device_get(run(single(other), single(direction), batch))

    flat = jax.tree.map(lambda s: s[:, :-1].reshape(-1, *s.shape[2:]), rows.states)
    numbers = np.asarray(at_state(flat)).reshape(rows.valid.shape)
    paths = [
        list(zip(numbers[i][valid], rows.action[i][valid], strict=True))
        for i, valid in enumerate(rows.valid)
    ]
    at = lambda h: tables.losses(  # noqa: E731
        jax.tree.map(lambda p, d: p + h * d, other, direction), paths, given, weight, other
    )
    values, above, below = at(0), at(1e-5), at(-1e-5)
    assert set(values) == set(made)
    for loss, (value, slope) in found.items():
        np.testing.assert_allclose(value, values[loss], rtol=1e-4, err_msg=loss)
        expected = (above[loss] - below[loss]) / 2e-5
        np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-3, err_msg=loss)


def test_potentials_of_which_some_steps_are_kept_are_unbiased_where_even():
    """The second part, (L / kept) times the sum kept - log R: 0 for equal potentials whatever is
    kept, above 0 for others with the same sum."""
    grid = gflownets.hypergrid(1, 4, lambda position: 2.0 * jnp.ones(position.shape[0]))
    policy = gflownets.mlp_policy(grid, (4,))
    rows = gflownets.rollout(grid, policy, policy.init(KEY), KEY, 32)
    # of a walk of L steps: 2 / L each, or all of it in the last
    length = rows.valid.sum(1)
    seen = grid._replace(observe=lambda s: jnp.repeat(length, 5).astype(jnp.float32))
    even = Field(None, lambda params, x, *_, key=None: jnp.stack([2 / x, 2 / x], 1))
    last = Field(None, lambda params, x, *_, key=None: jnp.stack([0 * x, 0 * x + 2], 1))
    params = policy.init(KEY) | {"potential": {}}
    found = [
        losses.learned_energy_decomposition(seen, policy, net, keep=0.5)(
            params, KEY, rows._asdict()
        )[1]["decomposition"]
        for net in (even, last)
    ]
    assert found[0] < 1e-10 < 0.1 < found[1]


def test_training_by_rollouts_ends_near_the_rewards():
    """9 objects of 1 to 5 steps; total variation from over 0.15 to below 0.03; log Z has a learning
    rate of its own, epsilon falls with the updates."""
    environment = GRID
    policy = gflownets.mlp_policy(environment, (16,))
    optimizer = optax.partition(
        {"net": optax.adam(1e-2), "log_z": optax.adam(1e-1)}, {"net": "net", "log_z": "log_z"}
    )
    rollouts = gflownets.rollouts(environment, policy, 16, epsilon=lambda n: 0.5 * 0.99**n)
    step = train.make_step(losses.trajectory_balance(policy), optimizer)
    states = gflownets.enumerate_states(environment)
    target = gflownets.reward_distribution(states)

    @jax.jit
    def run(state, keys):
        one = lambda state, key: step(state, rollouts(state, key))  # noqa: E731
        state, metrics = jax.lax.scan(one, state, keys)
        found = gflownets.exact_distribution(policy, state.params, states)
        return gflownets.total_variation(found, target), metrics["log_z"][-1]

    state = train.init_state(policy.init(KEY), optimizer, jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), 400)
    before = gflownets.exact_distribution(policy, state.params, states)
    variation, log_z = jax.device_get(run(state, keys))
    assert gflownets.total_variation(before, target) > 0.15 and variation < 0.03
    assert abs(log_z - np.log(REWARDS.sum())) < 0.1
    assert set(rollouts(state, KEY)) == set(gflownets.Trajectories._fields)


def test_each_row_has_its_condition():
    """A loss of rows of one length is the mean of those of single rows; potentials and
    parents get the condition of their row."""
    environment = gflownets.sequences(gflownets.reward_table(REWARDS), 2, 3)
    policy = gflownets.mlp_policy(environment, (4,))
    potential = jflow.field(gflownets.Perceptron(3, (4,)))
    cond = np.array([[-1.0, 0.5], [2.0, 0.0], [0.3, 1.0]], np.float32)
    params = policy.init(KEY, cond[:1])
    x = environment.observe(environment.reset(1))
    params["potential"] = potential.init(KEY, x, jnp.zeros(1), cond[:1])
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda a: np.float32(a + draw(size=a.shape)), params)
    batches = gflownets.rollouts(environment, policy, 3, conds=lambda key, n: jnp.asarray(cond))
    state = train.init_state(params, optax.sgd(0.1), KEY)
    rows = jax.device_get(batches(state, KEY))
    np.testing.assert_array_equal(rows["cond"], cond)

    @jax.jit
    def run(batch):
        return [
            loss(params, jax.random.clone(KEY), batch)[0]
            for loss in (
                losses.trajectory_balance(policy),
                losses.gfn_flow_matching(environment, policy),
                losses.learned_energy_decomposition(environment, policy, potential, keep=1.0),
            )
        ]

    single = [run(jax.tree.map(lambda a, i=i: a[i : i + 1], rows)) for i in range(3)]
    np.testing.assert_allclose(run(rows), np.mean(single, axis=0), rtol=1e-5)
    assert not np.allclose(run(rows), run(rows | {"cond": cond[::-1].copy()}), rtol=1e-2)


def test_bad_options_and_batches():
    policy = gflownets.mlp_policy(GRID, (4,))
    params = policy.init(KEY)
    rows = gflownets.rollout(GRID, policy, params, KEY, 3)._asdict()
    loss = losses.trajectory_balance(policy)
    for change, message in (
        ({"valid": None}, r"trajectories, .* without \['valid'\]"),
        ({"action": rows["action"][:, :2]}, r"'action' of shape \[3, 5\], got \[3, 2\]"),
        ({"log_reward": rows["action"]}, r"'log_reward' of shape \[3\], got \[3, 5\]"),
        ({"valid": rows["valid"][0]}, r"'valid' \[n, T\], got \[5\]"),
        ({"weight": np.ones(2)}, r"'weight' of shape \[3\], got \[2\]"),
        ({"cond": np.ones((2, 1))}, "to lead with 3 rows"),
        ({"states": {**rows["states"], "stopped": rows["valid"]}}, r"'states' of shape \[3, 6\]"),
    ):
        with pytest.raises(ValueError, match=f"trajectory_balance: expected .*{message}"):
            loss(params, None, rows | change)
    for make, message in (
        (lambda: losses.sub_trajectory_balance(policy, decay=0.0), r"decay in \(0, 1\], got 0.0"),
        (lambda: losses.modified_detailed_balance(SETS, policy), "a stop action, got stop=None"),
        (
            lambda: losses.learned_energy_decomposition(GRID, policy, Field(None, None), keep=1.5),
            r"keep in \(0, 1\], got 1.5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="expected a Policy, got a Environment|an Environment"):
        losses.detailed_balance(GRID)
    negative = gflownets.hypergrid(1, 2, lambda position: jnp.log(position[:, 0] - 0.5))
    walker = gflownets.mlp_policy(negative, (4,))
    state = train.init_state(walker.init(KEY), optax.sgd(0.1), KEY)
    with pytest.raises(ValueError, match="finite log-rewards, got a log-reward of nan at update 0"):
        gflownets.rollouts(negative, walker, 8)(state, KEY)
    narrow = gflownets.policy(GRID, Field(None, lambda *_, key=None: jnp.zeros((3, 2))))
    with pytest.raises(ValueError, match=r"an output of shape \[3, 7\], .* got \[3, 2\]"):
        narrow.apply({"net": {}}, GRID.reset(3))
