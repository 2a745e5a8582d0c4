import json

import pytest

from mlra_jax.cli.plot import draw_run, main, smoothed


def write_run(folder, shift=0.0):
    folder.mkdir()
    lines = [{"step": s, "loss": 5.0 - s + shift, "tokens": 100 * (s + 1)} for s in range(4)]
    lines.append({"step": 4, "eval_loss": 1.5 + shift, "tokens": 400})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_plot_draws_several_runs_into_one_png_and_prints_its_path(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, shift)) for name, shift in [("a", 0.0), ("b", 1.0)]]
    out = tmp_path / "new folder" / "losses.png"
    assert main([*runs, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(out)


@pytest.mark.parametrize(("x", "expected"), [("step", [0, 1, 2, 3]), ("tokens", [100, 200, 300, 400])])
def test_curves_hold_the_run_s_losses_over_the_chosen_axis(tmp_path, x, expected):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_run(axes, str(write_run(tmp_path / "a")), x, smooth=0.0)
    train, held_out = axes.get_lines()
    assert list(train.get_xdata()) == expected
    assert list(train.get_ydata()) == [5.0, 4.0, 3.0, 2.0]
    assert list(held_out.get_ydata()) == [1.5]
    assert [line.get_label() for line in (train, held_out)] == ["a: training", "a: held out"]


def test_smoothing_is_an_unbiased_running_mean():
    assert smoothed([3.0, 3.0, 3.0], 0.9) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 2.0], 0.5) == pytest.approx([1.0, 2.5 / 1.5])
    assert smoothed([1.0, 2.0], 0.0) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no such run"], "No metrics in no such run"),
        ([], "Name at least one run"),
        (["run", "--smooth", "1"], "--smooth=1.0 must be at least 0"),
        (["no such run", "--out", "x.foo"], "--out x.foo must be a file that ends in ."),
        (["no such run", "--out", "x"], "--out x must be a file that ends in"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(args)
    assert message in capsys.readouterr().err


def test_a_run_without_any_loss_yet_is_refused(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "lo')
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "hold no loss yet" in capsys.readouterr().err
