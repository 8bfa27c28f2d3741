"""The GPUs' mailboxes: their size, and what the ops say of those that do not fit. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu_ops import TOP_K
from max.driver import CPU
from max.dtype import DType
from max.engine import Model
from max.graph import BufferType, BufferValue, DeviceRef, TensorType, TensorValue
from small_graphs import Ops, graph_of
from test_parallel_plan import FLASH
from transformers import AutoConfig

from step3p5 import mailboxes
from step3p5.batch_processor import Step3p5BatchProcessor
from step3p5.layers.dispatch import MailboxDispatch
from step3p5.layers.moe import RoutedTokens
from step3p5.mailbox_size import mailbox_bytes, most_tokens
from step3p5.mailboxes import Mailboxes, MemoryPlanner
from step3p5.model import Step3p5Model
from step3p5.model_config import Step3p5Config
from step3p5.parallel_plan import parallel_plan
from step3p5.pretrained_config import as_step3p5_config

HOST = DeviceRef.CPU()
HIDDEN, EXPERTS = FLASH.hidden_size, 288


def send_tokens(mailbox: BufferValue, addresses: TensorValue, *own: TensorValue) -> list[TensorValue]:
    way = MailboxDispatch([range(EXPERTS)], addresses, [mailbox], addresses)
    way.send([RoutedTokens(*own)])
    return []


GRAPHS = {
    "mailbox_send": graph_of(
        send_tokens,
        [
            BufferType(DType.uint8, ["bytes"], HOST),
            TensorType(DType.int64, ["devices"], HOST),
            TensorType(DType.float32, ["tokens", "hidden_size"], HOST),
            TensorType(DType.int32, ["tokens", "top_k"], HOST),
            TensorType(DType.float32, ["tokens", "top_k"], HOST),
        ],
    )
}
"""Sends the tokens of one of several devices, all of them the host, where the op ends once it has checked all."""


@pytest.fixture(scope="session")
def send(small_models: Mapping[str, Model]) -> Ops:
    return Ops(small_models, "mailbox")


def sending(send: Ops, num_bytes: int, devices: int, tokens: int, hidden: int = HIDDEN) -> Callable[[], Any]:
    operands = [
        np.zeros(num_bytes, np.uint8),
        np.zeros(devices, np.int64),
        np.zeros((tokens, hidden), np.float32),
        np.zeros((tokens, TOP_K), np.int32),
        np.zeros((tokens, TOP_K), np.float32),
    ]
    return lambda: send.execute("send", *operands)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("tokens", [1, 128, 200])
def test_a_mailbox_has_room_for_what_it_was_made_for(send: Ops, devices: int, tokens: int) -> None:
    num_bytes = mailbox_bytes(FLASH, devices, tokens, itemsize=4)
    with pytest.raises(Exception, match="on a CPU, expected a GPU"):
        sending(send, num_bytes, devices, tokens)()
    room = -(-tokens // 128) * 128
    with pytest.raises(Exception, match=rf"found {room + 1} tokens .* at most the {room} .*--max-batch-input-tokens"):
        sending(send, num_bytes, devices, room + 1)()


@pytest.mark.parametrize(
    ("surplus", "devices", "hidden", "message"),
    [
        (1, 2, HIDDEN, r"mailbox\[bytes\]"),
        (0, 3, HIDDEN, r"mailbox\[bytes\]"),
        (0, 2, HIDDEN + 2, r"mailbox\[bytes\]"),
    ],
)
def test_a_mailbox_of_another_model_is_refused(
    send: Ops, surplus: int, devices: int, hidden: int, message: str
) -> None:
    num_bytes = mailbox_bytes(FLASH, 2, 128, itemsize=4) + surplus
    with pytest.raises(Exception, match=message):
        sending(send, num_bytes, devices, 1, hidden)()


def test_a_mailbox_holds_a_token_for_every_device() -> None:
    row, route = 2 * HIDDEN, 8 * TOP_K
    assert mailbox_bytes(FLASH, 8, 8192, itemsize=2) == 256 + 8192 * (route + row + 8 * row)
    assert mailbox_bytes(FLASH, 8, 8193, itemsize=2) == mailbox_bytes(FLASH, 8, 8320, itemsize=2)


def test_a_step_may_hold_a_whole_prompt_where_prompts_are_not_cut() -> None:
    assert most_tokens(8192, 256, whole_prompt=0) == 8448
    assert most_tokens(8192, 256, whole_prompt=4096) == 12544


def test_every_device_has_a_mailbox_whose_address_all_know() -> None:
    plan = parallel_plan(FLASH, 2, ep_size=2, data_parallel_degree=2)
    *boxes, addresses = Mailboxes(plan, [CPU(), CPU()], num_tokens=3, itemsize=2).model_inputs()
    assert [box.shape for box in boxes] == [(mailbox_bytes(FLASH, 2, 3, itemsize=2),)] * 2
    assert addresses.to_numpy().tolist() == [box._data_ptr() for box in boxes]
    assert not any(box.to_numpy().any() for box in boxes)


def test_gpus_that_cannot_read_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("no peer access")

    monkeypatch.setattr(mailboxes, "enable_all_peer_access", refuse)
    gpus: list[Any] = [SimpleNamespace(is_host=False)] * 2
    with pytest.raises(RuntimeError, match="--devices: found 2 GPUs that cannot read each other's memory"):
        Mailboxes(parallel_plan(FLASH, 2, ep_size=2, data_parallel_degree=2), gpus, num_tokens=3, itemsize=2)


@pytest.mark.parametrize(("chunked", "tokens"), [(True, 100 + 8), (False, 100 + 8 + 50)])
def test_a_model_with_requests_of_each_devices_own_hands_mailboxes_to_every_step(chunked: bool, tokens: int) -> None:
    runtime = SimpleNamespace(
        max_batch_input_tokens=100, max_batch_size=8, max_seq_len=50, enable_chunked_prefill=chunked
    )
    model: Any = Step3p5Model.__new__(Step3p5Model)
    model.devices, model._batch_processor = [CPU(), CPU()], Step3p5BatchProcessor.__new__(Step3p5BatchProcessor)
    model.batch_processor.runtime = runtime
    config = object.__new__(Step3p5Config)
    config.plan, config.dtype = parallel_plan(FLASH, 2, ep_size=2, data_parallel_degree=2), DType.bfloat16
    model._init_distributed_runtime(None, config)
    model._wire_batch_processor(None, config)
    *boxes, addresses = model.batch_processor._ep_inputs()
    assert [box.shape for box in boxes] == [(mailbox_bytes(FLASH, 2, tokens, itemsize=2),)] * 2
    assert addresses.shape == (2,)


@pytest.mark.parametrize(("chunked", "tokens"), [(True, 100 + 8), (False, 100 + 8 + 50)])
def test_memory_for_mailboxes_is_planned(tiny: Path, chunked: bool, tokens: int) -> None:
    huggingface_config = AutoConfig.from_pretrained(tiny)
    model = as_step3p5_config(huggingface_config).model_config
    runtime = SimpleNamespace(max_batch_input_tokens=100, max_batch_size=8, enable_chunked_prefill=chunked)

    def planned(degree: int) -> int:
        config = SimpleNamespace(model=SimpleNamespace(data_parallel_degree=degree, max_length=50), runtime=runtime)
        return MemoryPlanner.__new__(MemoryPlanner).estimate_activation_memory(config, huggingface_config)

    assert planned(1) == 0
    assert planned(4) == 4 * mailbox_bytes(model, 4, tokens, itemsize=2)
