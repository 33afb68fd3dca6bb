"""What a finished capture says of itself: `skipped.jsonl`, the tokenizer, `manifest.json`."""

from __future__ import annotations

import json
import logging
from collections import Counter

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.identity import Identity, library_versions
from fusechat_fuse.store.files import write_atomic
from fusechat_fuse.store.shard_writer import ShardWriter
from fusechat_fuse.store.tokenizers import save_tokenizer
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.text.conversations import ReadReport, count_reasons
from fusechat_fuse.text.templates import OTHER_TEMPLATE, check_template

logger = logging.getLogger(__name__)
MAX_NON_FINITE_SHARE = 0.01


def check_finite(non_finite: int, total: int) -> None:
    """Raise RuntimeError where too many of the conversations have logits that are not finite."""
    if non_finite > MAX_NON_FINITE_SHARE * total:
        raise RuntimeError(
            f"{non_finite} of {total} conversations have logits that are not finite ({non_finite / total:.1%}; at most "
            f"{MAX_NON_FINITE_SHARE:.0%} are left out). Run the model in bfloat16 or float32, or check its weights."
        )


def finish(
    writer: ShardWriter,
    num_shards: int,
    report: ReadReport,
    encoder: ConversationEncoder,
    made_from: Identity,
    template_of: str,
) -> None:
    """Put the shards' accounts together, once all are there; `manifest.json` is the last file.

    Args:
        report: what became of the rows that were read. encoder: what turned them into ids. made_from: the model.
        template_of: whose chat template it is.
    """
    infos = [writer.info(n)["info"] for n in range(num_shards)]
    skipped = report.skipped + [entry for info in infos for entry in info["skipped"]]
    by_reason = count_reasons(skipped)
    if not any(writer.info(n)["rows"] for n in range(num_shards)):
        got = f"{', '.join(f'{count} {reason}' for reason, count in by_reason.items())}: {skipped[0]['detail']}"
        raise InputError(
            f"data for {writer.path}: expected at least one usable conversation, got none ({got}). Mend the data or "
            "the options."
        )
    _write_skipped(writer, skipped, report.repaired)
    check_finite(by_reason.get("non_finite", 0), report.rows - len(report.skipped))
    check_template(skipped, report.rows - len(report.skipped))
    context_answers = sum(info.get("context_answers", 0) for info in infos)
    ends, ends_kept = (sum(info.get("ends", (0, 0))[n] for info in infos) for n in (0, 1))
    waste = round(1 - sum(i["run_tokens"] for i in infos) / max(sum(i["padded_tokens"] for i in infos), 1), 4)
    counts = {
        "rows_read": report.rows,
        "skipped": by_reason,
        "repaired": count_reasons(report.repaired),
        "truncated": sum(info["truncated"] for info in infos),
        "context_answers": context_answers,
        "ends": ends,
        "ends_kept": ends_kept,
        "padding_share": waste,
    }
    save_tokenizer(encoder.tokenizer, writer.path)
    made = _made(writer.identity, encoder, made_from, template_of, infos[0]["vocab_size"])
    made["datasets"] = report.data
    writer.finish(num_shards, {**made, "versions": library_versions(), "counts": counts})
    if share := by_reason.get("non_finite", 0) / max(report.rows, 1):
        logger.warning(
            "%.2f %% of the conversations have logits that are not finite and are left out here; no later pass that "
            "filters NaN is needed.",
            100 * share,
        )
    if context_answers:
        logger.warning(
            "%d answers are context only: the chat template renders them otherwise once the conversation goes on. %s.",
            context_answers,
            OTHER_TEMPLATE,
        )
    if ends_kept < ends / 10:
        logger.warning(
            "At %d of %d ends of turn the model has its own, %r, among its %d most likely tokens: it is a base model, "
            "or ends turns otherwise (look at template and tokenizer). Of a source the label stands at the others.",
            *(ends_kept, ends, encoder.end_of_turn, writer.identity["options"]["top_k"]),
        )
    for detail, count in Counter(e["detail"] for e in skipped if e["reason"] == "template").most_common(1):
        logger.warning("%d conversations skipped, as %s. %s.", count, detail, OTHER_TEMPLATE)
    if skipped:
        logger.warning("%d of %d rows skipped: %s (see %s)", len(skipped), report.rows, by_reason, "skipped.jsonl")
    logger.info("%s: padding %.1f %% of the tokens run", writer.path, 100 * waste)


def _write_skipped(writer: ShardWriter, skipped: list[dict], repaired: list[dict]) -> None:
    entries = [{"action": "skipped", **e} for e in skipped] + [{"action": "repaired", **e} for e in repaired]
    lines = [json.dumps(entry, ensure_ascii=True, sort_keys=True) + "\n" for entry in entries]
    write_atomic(writer.path / "skipped.jsonl", "".join(lines).encode())


def _made(identity: dict, encoder: ConversationEncoder, made_from: Identity, template_of: str, vocab_size: int) -> dict:
    """What made the representation, as the manifest says it."""
    tokenizer = encoder.tokenizer
    return {
        "options": {**identity["options"], "template": identity["template"]["name"]},
        "model": {**made_from, "vocab_size": vocab_size},
        "tokenizer": {
            "sha256": identity["tokenizer"],
            "class": type(tokenizer).__name__,
            "bos_id": tokenizer.bos_token_id,
            "eos_id": tokenizer.eos_token_id,
            "end_of_turn_id": encoder.end_of_turn_id,
        },
        "template": {
            **identity["template"],
            "of": template_of,
            "built_in": encoder.template.built_in,
            "source": encoder.template.source,
        },
        "data": identity["data"],
    }
