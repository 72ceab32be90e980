"""Public GPU measurements as operating-point tables, where the folder with them is present. No row of them is in the
project; only error figures with their source are."""

import csv
from pathlib import Path

# Mean prompt and output lengths [tok] of the workloads, as the measurements' provenance states them.
APERTUS_LENGTHS = {"chat": (630, 190), "summarization": (2742, 216), "opb": (563, 483)}
APERTUS_KV_TOKENS = {"plain": 469_840, "dspark": 342_800, "eagle": 433_872}
APERTUS_METHODS = {"plain": "none", "dspark": "block", "eagle": "eagle3"}


def apertus_rows(shared: Path, drafter: str) -> list[dict]:
    """Apertus-8B on one GH200 (vLLM): the rows of one drafter (dspark or eagle) with those without speculation."""
    rows = []
    with open(shared / "traces" / "swissai_apertus_gh200" / "apertus8b_kgrid.csv", newline="") as file:
        for line in csv.DictReader(file):
            kind = line["arm"].split("-")[0]
            if kind not in ("plain", drafter):
                continue
            prompt, output = APERTUS_LENGTHS[line["workload"]]
            rows.append(
                {
                    "deployment": f"apertus-8b-gh200/{drafter}",
                    "run": f"{line['sweep']}/{line['arm']}/{line['workload']}/c{line['concurrency']}",
                    "workload": line["workload"],
                    "hardware": "1x GH200",
                    "method": APERTUS_METHODS[kind],
                    "draft_length": int(line["k"]),
                    "tokens_per_step": line["mean_acceptance_length"] if int(line["k"]) else "",
                    "concurrency": line["concurrency"],
                    "max_batch_size": 256,
                    "kv_capacity_tokens": APERTUS_KV_TOKENS[kind],
                    "max_batched_tokens": 16384,
                    "prompt_length": prompt,
                    "output_length": output,
                    "throughput": float(line["out_tok_s"]) / output,
                    "ttft_p50": float(line["ttft_p50_ms"]) / 1e3,
                    "tpot_p50": float(line["tpot_p50_ms"]) / 1e3,
                }
            )
    return rows


def digitalocean_rows(shared: Path) -> list[dict]:
    """Llama-3.3-70B FP8 on one H200 (vLLM), Poisson arrivals, without speculation; one deployment a server setting."""
    rows = []
    with open(shared / "traces" / "do_llama70b_h200_openloop" / "summary.csv", newline="") as file:
        for line in csv.DictReader(file):
            if line["spec_decode_num_drafts"]:
                continue  # its drafter accepts nothing and its outputs are longer: no matched comparison
            seconds = {
                f"{ours}_mean": float(line[f"mean_{theirs}_ms"]) / 1e3
                for ours, theirs in (("ttft", "ttft"), ("itl", "itl"), ("tpot", "tpot"), ("e2e", "e2el"))
            } | {
                f"{ours}_p{percent}": float(line[f"p{percent}_{theirs}_ms"]) / 1e3
                for ours, theirs in (("ttft", "ttft"), ("e2e", "e2el"))
                for percent in (50, 95, 99)
            }
            rows.append(
                {
                    "deployment": f"llama70b-h200/{line['label']}/{line['ts']}",
                    "run": line["file"],
                    "hardware": "1x H200",
                    "method": "none",
                    "draft_length": 0,
                    "arrival_rate": line["rate"],
                    "arrival_process": "poisson",
                    "max_batch_size": 128 if "seqs128" in line["label"] or "moderate" in line["label"] else "",
                    "prompt_length": line["isl"],
                    "output_length": line["osl"],
                    "n_requests": line["completed"],
                    "failed": line["failed"],
                    "throughput": line["request_throughput"],
                }
                | seconds
            )
    return rows


def write_table(rows: list[dict], path: Path) -> Path:
    """Write rows as an operating-point CSV."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path
