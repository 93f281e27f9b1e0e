"""Many machines: groups of images and parts of the pairs as tasks of Ray's actors.

The driver alone writes, through the same files as the engine on one machine: a task that dies with
its worker is given to another, and a driver that dies leaves whole parts, which the next one does
not ask for again. Features are placed once in Ray's shared memory and are sent to a machine that
does not have them; a task that follows in the same tile finds them there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashmaps.batches.collection import Collection
from flashmaps.batches.features import FeatureStage, Group
from flashmaps.batches.ray_worker import Question, Worker, pack, unpack
from flashmaps.batches.rows import Done
from flashmaps.diffusion.features import Features
from flashmaps.matching.pair_chunks import compared_bytes

QUEUED = 2  # tasks that a worker has at once: one that runs, and one whose arguments come meanwhile
RETRIES = 8  # of a task whose worker died: more is no accident
_LEAST_STORE = 128 * 2**20  # bytes of shared memory; Ray wants some


class Cluster:
    """Actors that answer for one run.

    Attributes:
        count: how many there are.
    """

    def __init__(
        self, ray: Any, question: Question, count: int, per_worker: dict[str, int]
    ) -> None:
        self._ray, self.question, self.count = ray, question, count
        actor = ray.remote(Worker).options(
            max_restarts=-1, max_task_retries=RETRIES, **per_worker
        )  # fmt: skip
        self._actors = [actor.remote(question) for _ in range(count)]

    def features(self, stage: FeatureStage, groups: Sequence[int]) -> Iterator[Group]:
        """Features of groups, in the order in which they become ready."""

        def ask(actor: Any, group: int) -> Any:
            images = [sent(stage.collection, i) for i in stage.numbers(group)]
            return actor.features.remote(group, images)

        for group, found in self._answers(groups, ask):
            yield group, [unpack(each) for each in found]

    def pairs(
        self, parts: Sequence[tuple[int, np.ndarray]], pairs: np.ndarray,
        points: Sequence[np.ndarray] | None, sets: Sequence[Features], memory_budget: int,
    ) -> Iterator[Done]:  # fmt: skip
        """Tables of parts, in the order in which they become ready.

        Args:
            parts, pairs, points: numbers of the pairs of each part; all pairs; points of each.
            memory_budget: bytes for matches in each worker; and for features that are kept placed,
                beyond those of tasks that run.
        """
        needed = [np.unique(pairs[numbers]).tolist() for _, numbers in parts]
        placed = _Placed(self._ray, sets, self.question.settings.compare, needed, memory_budget)

        def ask(actor: Any, place: int) -> Any:
            part, numbers = parts[place]
            images = needed[place]
            return actor.pairs.remote(
                part, numbers, pairs[numbers],
                None if points is None else {n: points[n] for n in numbers.tolist()},
                memory_budget, images, *placed.of(place),
            )  # fmt: skip

        for _, done in self._answers(range(len(parts)), ask):
            yield done

    def _answers(
        self, tasks: Sequence[int], ask: Callable[[Any, int], Any]
    ) -> Iterator[tuple[int, Any]]:
        """(task, answer) as they come; no more are asked for than workers take at once."""
        ray = self._ray
        todo = iter(tasks)
        running: dict[Any, tuple[int, Any]] = {}

        def submit(actor: Any) -> None:
            if (task := next(todo, None)) is not None:
                running[ask(actor, task)] = task, actor

        for _ in range(QUEUED):
            for actor in self._actors:
                submit(actor)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            task, actor = running.pop(ready)
            answer = self._get(ready)
            submit(actor)  # before the answer is written, which takes a while
            yield task, answer
            del answer, ready

    def _get(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, (ValueError, OSError)):
                raise error.cause from None
            raise
        except errors.RayActorError as error:
            cause = getattr(error, "cause", None) or str(error).strip().splitlines()[-1]
            raise RuntimeError(
                f"Ray's workers died {RETRIES + 1} times at one task, or cannot start: {cause}. "
                "What was finished is kept; the same command goes on from there"
            ) from None


class _Placed:
    """References to features in Ray's shared memory, as many as fit; each is put there once, as
    long as tiles are taken in order.

    Args:
        needed: for each task, its images.
    """

    def __init__(
        self, ray: Any, sets: Sequence[Features], compare: str, needed: Sequence[Sequence[int]],
        limit: int,
    ) -> None:  # fmt: skip
        self._ray, self._sets, self._compare, self._limit = ray, sets, compare, limit
        self._needed = needed
        self._uses: dict[int, list[int]] = {}
        for task in range(len(needed) - 1, -1, -1):
            for image in needed[task]:
                self._uses.setdefault(image, []).append(task)  # the next one last
        self._held: dict[int, tuple[Any, int]] = {}
        self.puts = self.bytes = 0

    def of(self, task: int) -> list[Any]:
        """The references of a task; tasks come in their order."""
        images = self._needed[task]
        for image in images:
            self._uses[image].pop()
            if image not in self._held:
                found = self._sets[image]
                size = compared_bytes(found, self._compare)
                self._held[image] = self._ray.put(pack(found, self._compare)), size
                self.puts += 1
                self.bytes += size
        references = [self._held[image][0] for image in images]
        for image in [i for i in self._held if not self._uses[i]]:
            self._let_go(image)
        while self.bytes > self._limit:
            others = [image for image in self._held if image not in images]
            if not others:
                break
            self._let_go(max(others, key=lambda image: self._uses[image][-1]))
        return references

    def _let_go(self, image: int) -> None:
        self.bytes -= self._held.pop(image)[1]


def sent(collection: Collection, number: int) -> tuple[str, Any]:
    """An image on its way: its name in errors, and its file's bytes, or its pixels."""
    item, name = collection.items[number], f"image {collection.names[number]!r}"
    if isinstance(item, (str, Path)) and Path(item).is_file():
        return name, Path(item).read_bytes()
    return name, collection.load(number)


@contextmanager
def cluster(
    question: Question, *, address: str | None, workers: int | None, store: int
) -> Iterator[Cluster]:
    """A cluster for one run: the one at ``address``, that which this process has, or a new one.

    Args:
        question: what every task shares.
        address: of Ray's head, for instance "auto" or "ray://head:10001"; None: this machine.
        workers: how many; None: one for each GPU of the cluster where the device is one, else one
            for each of its CPUs, 16 at most.
        store: bytes of shared memory of a new one on this machine.

    Raises ImportError without Ray; ValueError where the cluster lacks what was asked for.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            f"engine='ray' needs Ray ({error}); install it with: pip install 'flashmaps[ray]'"
        ) from error
    ours = not ray.is_initialized()
    if ours and address is None:
        most = max(os.cpu_count() or 1, workers or 1)
        ray.init(
            num_cpus=most, object_store_memory=max(_LEAST_STORE, store), include_dashboard=False,
            log_to_driver=False, logging_level=logging.ERROR, configure_logging=False,
        )  # fmt: skip
    elif ours:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(f"address={address!r} leads to no Ray cluster: {error}") from None
    try:
        there = ray.cluster_resources()
        gpu = torch.device(question.device or "cpu").type == "cuda"
        what = "GPU" if gpu else "CPU"
        have = int(there.get(what, 0))
        count = (have if gpu else min(have, 16)) if workers is None else workers
        if count < 1 or count > have:
            raise ValueError(f"the cluster has {have} {what}s; {max(1, count)} workers need more")
        yield Cluster(ray, question, count, {"num_gpus": 1} if gpu else {"num_cpus": 1})
    finally:
        if ours:
            ray.shutdown()
