"""TensorBoard, and any object with the protocol."""

import pytest
import torch

import gradwatch
from gradwatch.sinks import Sink, TensorBoard
from testbed.models import lstm
from tests.test_watch import train


def test_scalars_reach_the_users_writer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)
    model = lstm()
    with gradwatch.watch(model, dir=None, sinks=[TensorBoard(writer)]) as watch:
        train(model, 25, spoil=22)
        peaks = watch.records.series("gradwatch/grad_norm")[1]
    writer.add_scalar("mine", 1.0, 0)  # still open: it is the user's
    writer.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    points = read.Scalars("gradwatch/grad_norm")
    assert [p.step for p in points] == [9, 19, 24]
    assert points[0].value == pytest.approx(max(peaks[:10]), rel=1e-6)
    assert "gradwatch/rnn/l0/rho" in read.Tags()["scalars"]
    assert [e.step for e in read.Tensors("gradwatch/nonfinite/text_summary")] == [22]


def test_what_is_no_writer_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch\.utils"):
        TensorBoard(3)


def test_the_protocol_is_two_methods():
    class Mine:
        def write(self, record, alerts=()):
            pass

        def close(self):
            pass

    assert isinstance(Mine(), Sink)
    assert not isinstance(torch.zeros(1), Sink)


@pytest.mark.parametrize("name", sorted({*gradwatch.sinks.__all__} - {"Sink"}))
def test_every_sink_of_ours_keeps_the_protocol(name):
    assert issubclass(getattr(gradwatch.sinks, name), Sink)


def test_pictures_reach_the_users_writer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)
    model = lstm()
    with gradwatch.watch(model, dir=None, sinks=[TensorBoard(writer)]):
        train(model, 25, spoil=22)
    writer.close()
    images = EventAccumulator(str(tmp_path)).Reload().Images("gradwatch/flow")
    assert [image.step for image in images][-1] == 24
    assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in images)


def test_pictures_can_be_left_out(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)
    model = lstm()
    sink = TensorBoard(writer, pictures=False)
    with gradwatch.watch(model, dir=None, sinks=[sink]):
        train(model, 25, spoil=22)
    writer.close()
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["images"] == []
