"""A few made-up questions of each published benchmark, in its published layout; gold answers are known."""

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.videos import write_video

_generator = np.random.default_rng(7)


def picture(path: Path, size: tuple[int, int] = (112, 112)) -> Path:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_generator.integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def picture_bytes() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (112, 112), (200, 40, 60)).save(out, format="PNG")
    return out.getvalue()


def lines(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def whole(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def needle(
    index: int, *, answer: object, images: int = 1, choices=None, pictures=None, length: int, depth
) -> dict:
    """A record of MM-NIAH."""
    return {
        "id": index,
        "images_list": ["a.png"] * images,
        "context": "A page. " + "<image> more text. " * images,
        "question": "Which one?",
        "answer": answer,
        "meta": {
            "placed_depth": depth,
            "context_length": length,
            "choices": choices,
            "choices_image_path": pictures,
        },
    }


def mm_niah(root: Path, *, per_cell: int = 1) -> Path:
    """Six tasks, two lengths, two depths."""
    data = root / "mm_niah_test"
    picture(data / "images" / "a.png")
    places = [(1500, 0.1), (1500, 0.9), (9000, 0.1), (9000, 0.9)] * per_cell
    made = {
        "retrieval-text": {"answer": "banana"},
        "counting-text": {"answer": [1, 2, 0]},
        "reasoning-text": {"answer": "Region C"},
        "retrieval-image": {"answer": 1, "choices": ["cat", "dog", "owl", "fox"]},
        "counting-image": {"answer": "[1, 2]"},
        "reasoning-image": {"answer": 0, "pictures": ["a.png", "a.png"]},
    }
    for task, values in made.items():
        records = [
            needle(index, length=length, depth=[depth] if "text" in task else depth, **values)
            for index, (length, depth) in enumerate(places)
        ]
        lines(data / "annotations" / f"{task}.jsonl", records)
    return root


def mm_niah_1m(root: Path) -> Path:
    for length, span, tokens in (("128k", "64_128", 100_000), ("1m", "512_1200", 900_000)):
        picture(root / f"long_mr_{length}" / "images" / "a.png")
        records = [needle(0, answer=2, choices=["a", "b", "c"], length=tokens, depth=0.5)]
        lines(root / f"long_mr_{length}" / f"test_long_mr_image_retrieval_{span}.jsonl", records)
    return root


def long_vqa(root: Path) -> Path:
    picture(root / "images" / "a.png")
    answers = {"chartqa": "10", "svqa": "B", "deepform": "ACME", "docvqa": "page", "okvqa": "dog"}
    answers |= {"textcaps": "a red square on a wall", "wikitablequestions": "2001"}
    for name, answer in answers.items():
        for length, span in ((32, "16_32"), (64, "56_64")):
            turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
            record = {"id": 5, "image": ["images/a.png"], "conversations": turns}
            record["metadata"] = {"context_length": length * 1000}
            lines(root / f"long_vqa_{length}k" / f"val_long_vqa_{name}_{span}.jsonl", [record])
    return root


def milebench(root: Path) -> Path:
    sets = {
        "ActionSequence": ("multi-choice", "took the dish", ["tidied up", "took the dish"]),
        "ALFRED": ("open-ended", "pick up the mug", None),
        "TextNeedleInAHaystack": ("open-ended", "4255", None),
        "MMCoQA": ("open-ended", "Bolivia", None),
        "GPR1200": ("multi-choice", "image2", ["image1", "image2"]),
    }
    for name, (kind, answer, choices) in sets.items():
        picture(root / name / "images" / "a.png")
        instance = {"context": "{image#1} and {image#2}: what?", "images_path": ["a.png", "a.png"]}
        record = {
            "sample_id": 0,
            "task_instruction_id": 0,
            "response": answer,
            "image_quantity_level": "Few",
            "task_instance": instance | ({"choice_list": choices} if choices else {}),
        }
        meta = {"task_instruction": ["Look."], "question_type": kind}
        whole(root / name / f"{name}.json", {"meta_data": meta, "data": [record, record | {"sample_id": 1}]})
    return root


def vqa(root: Path) -> Path:
    """InternVL's folder `data`: ChartQA, DocVQA, InfoVQA, AI2D, ScienceQA, POPE, SEED."""
    for split in ("human", "augmented"):
        picture(root / "chartqa" / "a.png")
        record = {"image": "data/chartqa/a.png", "question": "How many?", "question_id": 1, "answer": "10"}
        lines(root / "chartqa" / f"test_{split}.jsonl", [record])
    for folder, answers in (
        ("docvqa", "val/val_v1.0.json"),
        ("infographicsvqa", "infographicsVQA_val_v1.0_withQT.json"),
    ):
        picture(root / folder / "a.png")
        record = {"image": f"data/{folder}/a.png", "question": "Who?", "question_id": 7}
        lines(root / folder / "val.jsonl", [record])
        whole(root / folder / answers, {"data": [{"questionId": 7, "answers": ["Ada Lovelace", "Lovelace"]}]})
    picture(root / "ai2diagram" / "a.png")
    question = "Which?\nA. x\nB. y\nAnswer with the option's letter."
    record = {"image": "data/ai2diagram/a.png", "question": question, "question_id": 1, "answer": "B"}
    lines(root / "ai2diagram" / "test_vlmevalkit.jsonl", [record])
    picture(root / "scienceqa" / "images" / "a.png")
    record = {"image": "data/scienceqa/images/a.png", "hint": "Look.", "question": "Which?", "answer": 1}
    lines(root / "scienceqa" / "scienceqa_test_img.jsonl", [record | {"choices": ["north", "south"]}])
    picture(root / "pope" / "val2014" / "a.png")
    asked = [
        {"question_id": n, "image": "a.png", "text": "Is there a cat?", "category": category}
        for n, category in enumerate(("random", "random", "popular", "popular"))
    ]
    lines(root / "pope" / "llava_pope_test.jsonl", asked)
    for category in ("random", "popular"):
        lines(root / "pope" / "coco" / f"coco_pope_{category}.json", [{"label": "yes"}, {"label": "no"}])
    picture(root / "SEED" / "SEED-Bench-image" / "a.png")
    rows = [
        {"question_id": n, "image": "SEED-Bench-image/a.png", "text": "Q\nA. x\nB. y", "answer": "B"}
        for n in (1, 2)
    ]
    lines(root / "SEED" / "seed.jsonl", rows)
    types = [
        {"question_id": 1, "question_type_id": 3, "answer": "B"},
        {"question_id": 2, "question_type_id": 11, "answer": "A"},
    ]
    whole(root / "SEED" / "SEED-Bench.json", {"questions": types})
    return root


def mmbench(root: Path) -> Path:
    image = base64.b64encode(picture_bytes()).decode()
    columns = ["index", "image", "question", "hint", "A", "B", "C", "D", "answer", "category"]
    records = [
        [1, image, "Which?", "", "x", "y", "", "", "B", "logic"],
        [1_000_001, "1", "Which?", "", "y", "x", "", "", "A", "logic"],
    ]
    for split, is_known in (("dev", True), ("test", False)):
        path = root / "mmbench" / f"mmbench_{split}_en_20231003.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(columns)
            writer.writerows([*row[:8], row[8] if is_known else "", row[9]] for row in records)
    return root


def mmmu(root: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    image = {"bytes": picture_bytes(), "path": "a.png"}
    base = {f"image_{n}": None for n in range(2, 8)} | {"image_1": image}
    records = [
        base
        | {"id": "validation_Math_1", "question": "What is <image 1>?", "options": "['x', 'y']"}
        | {"answer": "B", "question_type": "multiple-choice", "image_2": image},
        base
        | {"id": "validation_Math_2", "question": "How many?", "options": "[]", "answer": "1200"}
        | {"question_type": "open"},
    ]
    path = root / "Math" / "validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return root


def mvbench(root: Path) -> Path:
    folder = root / "video" / "star" / "Charades_v1_480"
    folder.mkdir(parents=True)
    write_video(folder / "a.mp4", 30)
    record = {"video": "a.mp4", "candidates": ["runs", "sits"], "question": "What?", "answer": "sits"}
    whole(root / "json" / "action_sequence.json", [record | {"start": 0.0, "end": 2.0}])
    frames = root / "video" / "tvqa" / "frames_fps3_hq" / "clip"
    for number in range(1, 21):
        picture(frames / f"{number:05d}.jpg", (64, 48))
    whole(root / "json" / "episodic_reasoning.json", [record | {"video": "clip", "start": 0.0, "end": 6.0}])
    return root


def video_mme(root: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    (root / "data").mkdir(parents=True)
    write_video(root / "data" / "xyz.mp4", 30)
    record = {
        "videoID": "xyz",
        "duration": "short",
        "question_id": "001-1",
        "question": "What?",
        "answer": "C",
    }
    path = root / "videomme" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    options = ["A. one", "B. two", "C. three", "D. four"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record | {"options": options}]), path)
    return root


def mmlongbench(root: Path) -> Path:
    picture(root / "mmlb_image" / "a.png")
    base = {"id": "x", "question": "Which?", "ctxs": [{"text": "One <image>."}], "image_list": ["a.png"]}
    folder = root / "mmlb_data" / "NIAH"
    lines(folder / "retrieval-text_test_K8_dep6.jsonl", [base | {"answer": "the red key"}])
    lines(folder / "counting-text_test_K8_dep3.jsonl", [base | {"answer": [2, 3]}])
    lines(
        folder / "retrieval-image_test_K16_dep6.jsonl", [base | {"answer": 1, "choices_image": ["a.png"] * 2}]
    )
    record = {
        "id": "y",
        "question": "Who?",
        "ctxs": [{"title": "T", "text": "x"}],
        "image": "a.png",
        "answer": ["Ada"],
    }
    lines(root / "mmlb_data" / "vrag" / "viquae_K8_dep6.jsonl", [record])
    haystack = {"id": "z", "question": "Is there a dog?", "ctxs": ["a.png"] * 3, "answer": "Yes"}
    lines(folder / "vh_single_test_1000_K8_dep6.jsonl", [haystack, haystack | {"answer": "No"}])
    shown = {"image": "a.png", "id": 3}
    domain = {
        "exemplar_list": [[[shown, shown | {"id": 4}]], [[shown], [shown | {"id": 4}]]],
        "test_example": [shown | {"answer": 3}, shown | {"answer": 4}],
    }
    whole(root / "mmlb_data" / "ICL" / "food101_K8.json", {"food": domain})
    picture(root / "mmlb_image" / "slides" / "deck_about_the_owl" / "page1.png")
    page = "slides/deck_about_the_owl/page1.png"
    document = {"id": "d", "doc_name": "deck_about_the_owl", "question": "How many?", "page_list": [page] * 2}
    asked = [
        document | {"answer": answer, "answer_format": kind}
        for answer, kind in (("12", "Integer"), ("the red owl", "String"), ('["3", "7"]', "List"))
    ]
    lines(root / "mmlb_data" / "documentQA" / "slidevqa_K8.jsonl", asked)
    return root


# Benchmark -> (what makes its data, requests in it).
DATA = {
    "mm-niah": (mm_niah, 24),
    "mm-niah-1m": (mm_niah_1m, 2),
    "long-vqa": (long_vqa, 14),
    "milebench": (milebench, 10),
    "chartqa": (vqa, 2),
    "docvqa": (vqa, 1),
    "ai2d": (vqa, 1),
    "infovqa": (vqa, 1),
    "scienceqa": (vqa, 1),
    "pope": (vqa, 4),
    "mmmu-val": (mmmu, 2),
    "mmbench-en": (mmbench, 4),
    "seed-i": (vqa, 1),
    "mvbench": (mvbench, 2),
    "video-mme": (video_mme, 1),
    "mmlongbench": (mmlongbench, 11),
}


def oracle(name: str, gold: dict) -> str:
    """What a model that knows the answer says."""
    answer = gold["answers"][0] if "answers" in gold else gold["answer"]
    if name == "mmlongbench" and gold["set"] == "food101":
        return f"label: {answer}"
    if name in ("mm-niah", "mm-niah-1m", "mmlongbench") and isinstance(answer, int):
        return chr(65 + answer)
    if name in ("mm-niah", "mmlongbench") and isinstance(answer, list) and not isinstance(answer[0], str):
        return json.dumps(answer)
    if isinstance(answer, list):
        return str(answer[0])
    if gold.get("choices"):
        return chr(65 + gold["choices"].index(answer))
    return str(answer or "A")
