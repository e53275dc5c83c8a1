"""Questions about videos: MVBench (Li et al., 2024) and Video-MME (Fu et al., 2024).

    DATA/json/action_sequence.json ..., DATA/video/star/Charades_v1_480/...      (OpenGVLab/MVBench)
    DATA/videomme/test-00000-of-00001.parquet, DATA/data/VIDEOID.mp4             (lmms-lab/Video-MME)

Sixteen frames, one tile each, from the middle of as many equal intervals. The V2PE release has code for MVBench only;
its frames are at `int(start + seg / 2 + round(seg * i))`, which is within one frame of the middle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.evaluation.benchmarks.base import (
    Benchmark,
    DataFile,
    Mode,
    Part,
    Request,
    Row,
    Score,
    group_cells,
    mean,
    row_scores,
)
from megatron_v2pe.evaluation.benchmarks.files import inside, json_list, need, parquet_records
from megatron_v2pe.evaluation.metrics.letters import (
    clean_choice,
    letter_of,
    mvbench_is_correct,
    videomme_choice,
)

FRAMES = 16
_FRAME_FOLDER_FPS = 3.0
# Task: (annotation, folder of videos below video/, whether a record has a start and an end).
MVBENCH_TASKS = {
    "Action Sequence": ("action_sequence", "star/Charades_v1_480", True),
    "Action Prediction": ("action_prediction", "star/Charades_v1_480", True),
    "Action Antonym": ("action_antonym", "ssv2_video", False),
    "Fine-grained Action": ("fine_grained_action", "Moments_in_Time_Raw/videos", False),
    "Unexpected Action": ("unexpected_action", "FunQA_test/test", False),
    "Object Existence": ("object_existence", "clevrer/video_validation", False),
    "Object Interaction": ("object_interaction", "star/Charades_v1_480", True),
    "Object Shuffle": ("object_shuffle", "perception/videos", False),
    "Moving Direction": ("moving_direction", "clevrer/video_validation", False),
    "Action Localization": ("action_localization", "sta/sta_video", True),
    "Scene Transition": ("scene_transition", "scene_qa/video", False),
    "Action Count": ("action_count", "perception/videos", False),
    "Moving Count": ("moving_count", "clevrer/video_validation", False),
    "Moving Attribute": ("moving_attribute", "clevrer/video_validation", False),
    "State Change": ("state_change", "perception/videos", False),
    "Fine-grained Pose": ("fine_grained_pose", "nturgbd", False),
    "Character Order": ("character_order", "perception/videos", False),
    "Egocentric Navigation": ("egocentric_navigation", "vlnqa", False),
    "Episodic Reasoning": ("episodic_reasoning", "tvqa/frames_fps3_hq", True),
    "Counterfactual Inference": ("counterfactual_inference", "clevrer/video_validation", False),
}
_MVBENCH_LEAD = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n"
)
_VIDEOMME_LEAD = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option.\n"
)


class MVBench(Benchmark):
    """20 tasks of 200 questions."""

    name = "mvbench"
    title = "MVBench"
    metric = "accuracy over all questions (Li et al. 2024)"
    download = (
        "OpenGVLab/MVBench of Hugging Face: json/ into DATA/json/, every video archive below DATA/video/"
    )

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file a task."""
        return [
            DataFile(
                set=task,
                path=data_dir / "json" / f"{stem}.json",
                root=data_dir / "video" / folder,
                published=200,
            )
            for task, (stem, folder, _) in MVBENCH_TASKS.items()
        ]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        has_clip = MVBENCH_TASKS[file.set][2]
        for number, (where, record) in enumerate(json_list(file.path)):
            choices = need(record, "candidates", list, where)
            answer = need(record, "answer", str, where)
            if answer not in choices:
                raise DataError(f"{where}: answer {answer!r} is not among candidates")
            options = [f"({letter_of(index)}) {choice}" for index, choice in enumerate(choices)]
            question = f"Question: {need(record, 'question', str, where)}\nOptions:\n" + "\n".join(options)
            text = f"{_MVBENCH_LEAD}\n{question.rstrip()}\nOnly give the best option."
            clip = None
            if has_clip:
                clip = (
                    float(need(record, "start", (int, float), where)),
                    float(need(record, "end", (int, float), where)),
                )
            path = inside(file.root, need(record, "video", str, where), where)
            yield Request(
                id=f"{file.set}/{number}",
                parts=(
                    Part(kind="video", path=path, clip=clip, frames=FRAMES, fps=_FRAME_FOLDER_FPS),
                    Part(kind="text", text=text),
                ),
                max_new_tokens=1000,
                max_tiles=1,
                gold={"set": file.set, "answer": options[choices.index(answer)]},
            )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Share of all questions; tasks beside it."""
        values = [_mvbench_value(row, mode) for row in rows]
        cells = group_cells([(row.gold["set"], v) for row, v in zip(rows, values, strict=True)])
        empty = sum(not row.text.strip() for row in rows)
        notes = (
            (f"{empty} empty answers count as right in mode release",) if empty and mode == "release" else ()
        )
        return Score(
            mode=mode,
            metrics={"accuracy": mean(values)} | {cell.group: cell.mean for cell in cells},
            cells=cells,
            rows=row_scores(rows, values),
            notes=notes,
        )


class VideoMME(Benchmark):
    """2,700 questions about 900 videos of three lengths, without subtitles."""

    name = "video-mme"
    title = "Video-MME (without subtitles)"
    metric = "accuracy (Fu et al. 2024)"
    modes: tuple[Mode, ...] = ("original", "clean")
    download = "lmms-lab/Video-MME of Hugging Face: videomme/ and the unpacked videos (data/*.mp4) into DATA/"

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file."""
        path = data_dir / "videomme" / "test-00000-of-00001.parquet"
        return [DataFile(set="test", path=path, root=data_dir / "data", published=2700)]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        for where, record in parquet_records(file.path):
            options = [str(option) for option in need(record, "options", list, where)]
            question = need(record, "question", str, where)
            text = _VIDEOMME_LEAD + "\n".join([question, *options]) + "\nThe best answer is:"
            name = f"{need(record, 'videoID', str, where)}.mp4"
            yield Request(
                id=need(record, "question_id", str, where),
                parts=(
                    Part(kind="video", path=inside(file.root, name, where), frames=FRAMES),
                    Part(kind="text", text=text),
                ),
                max_new_tokens=16,
                max_tiles=1,
                gold={
                    "set": need(record, "duration", str, where),
                    "answer": need(record, "answer", str, where),
                },
            )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Share of all questions; by length of the video beside it."""
        values = [_videomme_value(row.text, row.gold, mode) for row in rows]
        cells = group_cells([(row.gold["set"], v) for row, v in zip(rows, values, strict=True)])
        return Score(
            mode=mode,
            metrics={"accuracy": mean(values)} | {cell.group: cell.mean for cell in cells},
            cells=cells,
            rows=row_scores(rows, values),
        )


def _mvbench_value(row: Row, mode: Mode) -> float:
    if mode == "clean":
        return float(clean_choice(row.text, "ABCDEFG") == row.gold["answer"][1])
    return float(mvbench_is_correct(row.text, row.gold["answer"]))


def _videomme_value(text: str, gold: Mapping[str, Any], mode: Mode) -> float:
    said = clean_choice(text, "ABCD") if mode == "clean" else videomme_choice(text)
    return float(said == gold["answer"])
