"""Charts of scaling laws: what there is is drawn, and nothing else."""

from jaxllm.reporting.scaling_charts import scaling_charts

LINE = {"flops": [1e18, 1e19], "parameters": [1e8, 3e8]}
EMPTY = {"count": "all", "curves": [], "profiles": [], "points": {}, "optima": {}}


def titles(**found):
    return [chart.title for chart in scaling_charts(EMPTY | found)]


def test_without_laws_there_are_no_charts():
    assert scaling_charts({}) == []
    assert titles() == []


def test_what_there_is_is_drawn():
    profile = {
        "flops": 1e18,
        "parameters": [1e7, 1e8, 1e9],
        "losses": [3.2, 3.0, 3.3],
        "fitted": [[1e7, 1e9], [3.2, 3.3]],
        "minimum": [1e8, 3.0],
    }
    assert titles(profiles=[profile]) == ["IsoFLOP profiles: loss, nats a token, by parameters"]
    curve = {"parameters": 1e7, "flops": [6e15, 6e16], "losses": [4.0, 3.0]}
    (title,) = titles(curves=[curve], points={"envelope": LINE | {"losses": [4.0, 3.0]}})
    assert title.startswith("Training curves and their envelope")
    (title,) = titles(optima={"envelope": LINE}, count="non_embedding")
    assert title == "The best size of a budget: parameters without embeddings"
    against = {"measured": [3.0, 2.0], "predicted": [3.1, 2.0]}
    assert len(titles(predicted={"fitted": against, "held out": against})) == 1


def test_a_score_is_drawn_by_loss_and_by_flops():
    score = {"losses": [2.0, 4.0], "scores": [0.9, 0.2], "flops": [1e19, 1e18]}
    score["fitted"] = [[2.0, 4.0], [0.9, 0.2]]
    assert titles(downstream={"copa": score, "copa/<b>": score}) == [
        "copa, by loss",
        "copa, by FLOPs",
        "copa/<b>, by loss",
        "copa/<b>, by FLOPs",
    ]
