"""Read the formats that nest questions in contexts: SQuAD's JSON, MRQA's JSON lines, Label Studio's export.

Each yields (where, record): a dict with id, question, context and answers, not yet checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plainloop.data.errors import InputError
from plainloop.data.readers.files import open_json, read_json, reading

Records = Iterator[tuple[str, dict[str, Any]]]


def squad_records(path: str) -> Records:
    """SQuAD 1.1 and 2.0. One article is in memory at a time."""
    found = False
    for i, article in enumerate(json_items(path, "data")):
        found = True
        for j, paragraph in enumerate(_items(article, "paragraphs", f"{path}: data[{i}]")):
            where = f"data[{i}].paragraphs[{j}]"
            for qa in _items(paragraph, "qas", f"{path}: {where}"):
                if not isinstance(qa, dict):
                    raise InputError(f"{path}: {where}: an entry of 'qas' is not an object.")
                yield where, {**qa, "context": paragraph.get("context"), "title": article.get("title")}
    if not found:
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("data"), list):
            raise InputError(f"{path}: not a SQuAD file: no list 'data' at the top level.")


def json_items(path: str, key: str = "") -> Iterator[Any]:
    """Yield the items of the list under a top-level key, or of a top-level list, one at a time."""
    import ijson

    try:
        with reading(path), open_json(path) as stream:
            yield from ijson.items(stream, f"{key}.item" if key else "item", use_float=True)
    except (ijson.JSONError, ValueError) as error:
        read_json(path)  # says the line and the column
        raise InputError(f"{path}: not valid JSON ({' '.join(str(error).split())}).") from None


def _items(container: Any, key: str, where: str) -> list[Any]:
    if not isinstance(container, dict) or not isinstance(container.get(key), list):
        raise InputError(f"{where}: not a SQuAD file: no list '{key}'.")
    return container[key]


def mrqa_records(path: str, rows: Iterator[tuple[int, Any]]) -> Records:
    """MRQA 2019. rows: (line, value) of the file. The detected answers come first, since they have positions;
    the other accepted answers serve scoring alone.
    """
    for line, row in rows:
        if isinstance(row, dict) and "header" in row:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("qas"), list):
            raise InputError(f"{path}: line {line}: not MRQA: no list 'qas'.")
        context: Any = row.get("context")
        for qa in row["qas"]:
            try:
                found = [answer for given in qa["detected_answers"] for answer in _detected(given, context)]
                texts = {answer["text"] for answer in found}
                others: list[Any] = [{"text": text} for text in _texts(qa["answers"]) if text not in texts]
                if found:
                    others = [{**other, "answer_start": -1, "reference": True} for other in others]
                record = {"id": qa["qid"], "question": qa["question"], "answers": found + others}
            except (TypeError, KeyError, ValueError) as error:
                name = qa.get("qid") if isinstance(qa, dict) else None
                raise InputError(f"{path}: line {line}: qid {name!r}: not MRQA ({error!r}).") from None
            yield f"line {line}", {**record, "context": context}


def _detected(answer: dict[str, Any], context: str) -> Iterator[dict[str, Any]]:
    """The places of a detected answer. Its spans include their last character."""
    for start, end in answer["char_spans"]:
        text = context[start : end + 1]
        if not 0 <= start <= end < len(context) or _folded(text) != _folded(answer["text"]):
            raise ValueError(f"the context has {text!r} at {start} to {end}, not {answer['text']!r}")
        yield {"text": text, "answer_start": start}


def _folded(text: str) -> str:
    return "".join(text.casefold().split())


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError("'answers' is not a list of texts")
    return value


def label_studio_records(items: Iterator[Any]) -> Records:
    """Tasks of Label Studio's JSON export. Fields of `data` keep their names; labelled spans of its text are
    the answers, and so are texts typed into a text area. No span: unanswerable. No annotation: a fault.
    """
    for number, task in enumerate(items, start=1):
        where = f"task {number}"
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            yield where, {"fault": "not a Label Studio task: no object 'data'"}
            continue
        record = {"id": str(task.get("id", number)), **task["data"]}
        try:
            given: Any = task.get("annotations") or task.get("completions") or []
            done = [annotation for annotation in given if not annotation.get("was_cancelled")]
            answers = [answer for annotation in done for answer in _labelled(annotation["result"])]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            yield where, {**record, "answers": [], "unlabelled": f"its annotation can't be read ({error!r})"}
            continue
        unlabelled = None if done else "not annotated; export the annotated tasks alone"
        yield where, {**record, "answers": answers, "unlabelled": unlabelled}


def _labelled(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for result in results:
        value = result.get("value")
        if not isinstance(value, dict):  # a relation between spans
            continue
        if result["type"] == "textarea":
            texts = value["text"]
            yield from ({"text": text} for text in ([texts] if isinstance(texts, str) else texts))
        elif result["type"] in ("labels", "hypertextlabels"):
            start = value.get("globalOffsets", value)["start"]  # hypertext: in the text, not in the markup
            yield {"text": value["text"], "answer_start": int(start)}
        elif {"start", "text"} & value.keys():
            raise ValueError(f"a span of type {result['type']!r}")
