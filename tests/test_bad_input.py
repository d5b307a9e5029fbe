"""A wrong command line or config costs one line on stderr: key, value, what is right. No run folder, no traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser

from intruders import amiss, answers
from symbiotic.launch import WRONG_CONFIG, launch, one_line
from symbiotic.schema import ConfigError, RunError

ROOT = Path(__file__).resolve().parents[1]


def two_phases(condition: str, more: str = "", until: int = 100) -> str:
    """A list of phases whose first one ends by a metric."""
    return f"phases.list=[{{name:a,until:{until},when:{{{condition}}}}},{{name:b,until:450{more}}}]"


NO_ADAM = "~rates.optimizer.betas ~rates.optimizer.eps"


def sources(option: str, files: str) -> str:
    """Data of the layout of texts, under the names of the mix."""
    sets = ("t2i", "t2i_long", "lm", "lm_unreplayed", "mmu")
    listed = ",".join(f"{name}:{{format:text,files:{files}}}" for name in sets)
    return f"data={option} data.source.tokenizer={__file__} data.source.sources={{{listed}}}"


WRONG = {  # the command line -> what the line says
    # unknown names
    "system=symbiotc": r"system=symbiotc: no such option; did you mean 'symbiotic'\?",
    "sytem=dense": r"sytem=dense: no such key; did you mean 'system'\?",
    "experiment=smok": r"experiment=smok: no such option; did you mean 'smoke'\?",
    "ablation=[ratio_3_1,no_shild]": r"ablation=no_shild: no such option; did you mean 'no_shielding'\?",
    "hydra/launcher=basc": r"hydra/launcher=basc: no such option; did you mean 'basic'\?",
    "phases.shield_stepz=3": r"phases\.shield_stepz=3: no such key; did you mean 'phases\.shield_steps'\?",
    "+phases.shield_stepz=3": r"phases\.shield_stepz: no such key; did you mean 'shield_steps'\?",
    "phase.steps=3": r"phase\.steps=3: no such key; did you mean 'phases'\?",
    "+sed=3": r"sed: no such key; did you mean 'seed'\?",
    "~system.name": r"system\.name: missing",
    "data=shards data.source.tokenizer=a": r"data\.source\.shards: missing; it has no default",
    "~system.nam": r"~system\.nam: nothing to delete; did you mean 'system\.name'\?",
    "seed.x=1": r"seed\.x=1: no such key; seed is 0 and has no keys",
    "system.routers={a:und}": r"system\.routers is empty; write \+\+system\.routers\.a=",
    "metric=readin": r"metric=readin: no such score; did you mean 'reading'\?",
    # the shape of the command line
    "[1,2": r"\[1,2: cannot be read as key=value",
    "seed=0,1": r"seed=0,1: several values need -m",
    "+seed=1": r"\+seed=1: seed is there already; leave the \+ away",
    "+experiment=smoke": r"\+experiment=smoke: experiment is chosen already; leave the \+ away",
    "system=null": r"system=null: must be an option of the group; known: bagel, ",
    "model=[embedded,smoke]": r"model=\[embedded,smoke\]: model takes one option",
    "phases.steps=${phases.stepz}": r"phases\.steps: Interpolation key 'phases\.stepz' not found",
    # types and numbers
    "seed=a": r"seed='a': must be int",
    "seed=-1": r"seed=-1: must be at least 0",
    "threads=0": r"threads=0: must be at least 1",
    "dry_run=1": r"dry_run=1: must be bool",
    "rates.lr=fast": r"rates\.lr='fast': must be float",
    "rates.lr=0": r"rates\.lr=0\.0: must be positive",
    "rates.decay=1.5": r"rates\.decay=1\.5: must lie in \[0, 1\]",
    "objective.flow_weight=inf": r"objective\.flow_weight=inf: must be at least 0",
    "objective.prediction=y": r"objective\.prediction='y': must be one of x, velocity",
    "evaluation.images=0": r"evaluation\.images=0: must be at least 1",
    "name=a/b": r"name=a/b: must be one plain folder name",
    "name=..": r"name=\.\.: must be one plain folder name",
    "run_dir=": r"run_dir='': must name a folder",
    "objective.time_mean=nan": r"objective\.time_mean=nan: must be a finite number",
    "model.num_experts=0": r"model\.num_experts=0: must leave at least one expert",
    "model.width=1000000000": r"model\.width=1000000000: must be at most 1,048,576",
    "data=shards data.source.tokenizer=/dev/null data.source.shards=3": r"data\.source\.shards=3: no such file",
    "+trainer.limit_train_batches=5": r"trainer\.limit_train_batches=5: must not be set; it follows from phases\.steps",
    "system=utamoe phases=utamoe lora=none": r"lora\.rank=0: a phase trains the low-rank updates that another freezes",
    "+trainer.min_steps=x": r"trainer\.min_steps=x: must not be set",
    "+trainer.fast_dev_run=true": r"trainer\.fast_dev_run=true: must not be set",
    "hydra.output_subdir=.hydra": r"hydra\.output_subdir=\.hydra: must be null; a run folder has its own config",
    "hydra.launcher._target_=os.getcwd": r"hydra\.launcher\._target_=os\.getcwd: must be a launcher of Hydra or of",
    "+hydra.callbacks.x._target_=logging.FileHandler": r"hydra\.callbacks=\['x'\]: must be empty; those of a run are",
    # model and system
    "model.router.top_k=9": r"model\.router\.top_k=9: tokens of kind text see only 8 experts .*at most 8",
    "system=tripartite model.router.top_k=5": r"model\.router\.top_k=5: tokens of kind text see only 4 experts",
    "model.gen_fraction=.01": r"system\.pools\.gen=0\.01: .*model\.num_experts=16.*at least 0\.0625 for one expert",
    two_phases("metric:train/ce"): r"phases\.list\[0\]\.when: .*above or below",
    two_phases("metric:trian/ce,below:1"): r"metric=trian/ce: .*'train/'",
    two_phases("metric:speed/tokens_per_s,above:1"): r"speed/tokens_per_s: no logged metric that a phase may end by",
    two_phases("metric:train/ce,below:1", ",mix:{lm:1,t2i:1}"): r"phases\.list\[1\]\.mix: .*fixed step",
    two_phases("metric:train/ce,below:1", until=400): r"phases\.list\[0\]\.until=400: .*step 315",
    "phases.list=[{name:b,until:450,when:{metric:train/ce,below:1}}]": r"phases\.list\[0\]\.when: the last phase",
    "phases.list=[{name:b,until:450,mix:{ml:1}}]": r"phases\.list\[0\]\.mix=ml: no such set .*lm,",
    f"callbacks.phase_transitions=null {two_phases('metric:train/ce,below:1')}": r"callbacks\.phase_transitions=null",
    "+rates.schedules.gne={decay:0.5}": r"rates\.schedules=gne: no such role; did you mean 'gen'",
    "+rates.schedules.gen={decay:2.0}": r"rates\.schedules\.gen\.decay=2.*\[0, 1\]",
    "objective.balance.bias_rate=.001": r"objective\.balance\.bias_rate=0\.001: .*model\.router\.bias=true",
    "objective.balance.kinds.vea=2": r"objective\.balance\.kinds\.vea=2: no such key; did you mean '.*kinds\.vae'",
    "objective.balance.scope=all": r"objective\.balance\.scope='all': must be one of router, global",
    "system=standard_moe objective.balance.scope=global": r"has no effect: .*one router",
    "model.router.bias=true": r"model\.router\.bias=true: has no effect: .*bias_rate is 0",
    "callbacks.balance_bias=null ablation=aux_loss_free": r"callbacks\.balance_bias=null: .*bias_rate needs it",
    "init.parent_shared=false": r"init\.parent_shared=false: .*shared expert",
    "init.parent_shared=true": r"init\.parent_shared=true: has no effect",
    "system=standard_moe init.gen_experts=random": r"has no effect: .*no pool that only generation sees",
    # task routers, merged experts, the mix with shared experts, low-rank updates
    "system=utamoe system.merge=3": r"system\.merge=3: must divide model\.num_experts=16",
    "system=utamoe model.gen_fraction=.05": r"pools\.gen=0\.05: .*model\.num_experts=16 / system\.merge=2 .*0\.125",
    "system=utamoe system.top_k=5": r"system\.top_k=5: tokens of kind text see only 4 experts",
    "system=utamoe system.top_k=0": r"system\.top_k=0: must be at least 1",
    "system=utamoe system.top_k=2": r"gate=straight_through: is for one expert per token, and system\.top_k=2",
    "system=utamoe system.gate=soft": r"system\.gate='soft': must be one of router, straight_through, probability",
    "system=utamoe system.alpha_scale=0": r"system\.alpha_scale=0.*must be positive",
    "system=utamoe system.shared.all=[text,vit,vae]": r"alpha_scale=2.*: tokens of kind prompt pass through no shared",
    "+system.task_router=true system=standard_moe": r"system\.task_router=true: all kinds see all: one group leaves",
    "+system.task_router=true system=multi_gate": r"system\.task_router=true: .*the pool all is seen by two",
    "system=utamoe mix=und_only": r"system\.task_router=true: the mix trains understanding only",
    "objective.task_weight=2": r"objective\.task_weight=2: has no effect: system=symbiotic has no task router",
    "objective.task_weight=-1": r"objective\.task_weight=-1.*must be at least 0",
    "phases.list=[{name:a,until:450,route_by:truth}]": r"phases\.list.*has no effect: the phase a has route_by: truth",
    "phases.list=[{name:a,until:450,route_by:true}]": r"route_by=True: must be one of predicted, truth",
    "+phases.stage1_steps=5": r"stage1_steps=5: has no effect: no entry of phases\.list refers to it",
    "phases=utamoe lora=r16 phases.stage1_steps=451": r"phases\.stage1_steps=451: must be at most phases\.steps=450",
    "lora.rank=-1": r"lora\.rank=-1: must be at least 0",
    "lora.rank=8": r"lora\.targets=\[\]: must name weights, as lora=r16 does",
    "lora.alpha=8": r"lora\.alpha=8: has no effect: lora\.rank is 0; set lora=r16",
    "lora=r16 lora.alpha=0": r"lora\.alpha=0.*must be positive",
    "lora=r16 lora.targets=[moe.pools.und.w_im]": r"lora\.targets.*pools\.und\.w_im' is no weight of .*did you mean",
    "lora=r16 lora.targets=['embed']": r"lora\.targets.*'embed' is no weight that can be updated of system=symbiotic",
    "lora=r16 lora.targets=['(']": r"lora\.targets=\(: no regular expression",
    "system=dense init.router=fresh": r"init\.router=fresh: has no effect: .*no routed experts",
    "surgery.roles=[shared]": r"surgery\.roles=\[shared\]: has no effect: surgery\.method is none",
    "surgery=upgrad surgery.cagrad_c=1": r"surgery\.cagrad_c=1: has no effect: surgery\.method is upgrad",
    "callbacks.collapse_alarm.action=reviv": r"action=reviv: no such action; did you mean 'revive'",
    "callbacks.collapse_alarm.action=rebalance ablation=no_balance": r"action=rebalance: has nothing to raise: .*",
    "callbacks.collapse_alarm.action=stop system=dense": r"action=stop: has no effect: .*no routed experts",
    "callbacks.routing_monitor=null": r"callbacks\.routing_monitor=null: .*set both to null",
    "ablation=router_only_split system=dense": r"no such pool .*set by ablation=router_only_split\)",
    "ablation=shield_strict system=mot": r"mot has no shield targets.*set by ablation=shield_strict\)",
    "ablation=[no_shielding,shield_strict]": r"ablation=shield_strict: has no effect .*no phase has a shield level",
    "ablation=[global_aux,no_balance]": r"ablation=global_aux: has no effect .*weight 0 in every phase",
    "compile=everything": r"compile='everything': must be one of none, inductor, aot_eager",
    "probe_samples=0": r"probe_samples=0: must be at least 1",
    "model.gen_fraction=1": r"system\.pools: 0 of model\.num_experts=16 are left for und",
    "system=tripartite model.gen_fraction=.3125": r"system\.pools: 11 of .* for text, vit: must be a positive multiple",
    "system.pools.und=0.25": r"system\.pools=0\.25 \+ 0\.5: the shares of the pools must add up to 1",
    "+system.pools.more=0.5": r"system\.pools: 0 of model\.num_experts=16 are left for und",
    "mix=und_only phases.shield_steps=3": r"phases\.shield_steps=3: .*the mix trains no generation samples",
    "callbacks.lr_phases=null": r"callbacks\.lr_phases=null: rates and phases need it",
    "callbacks.gradient_shielding=null": r"callbacks\.gradient_shielding=null: the shield needs it; set .*mode=none",
    "callbacks.evaluation=null": r"callbacks\.evaluation=null: evaluation\.every needs it",
    "trainer.strategy=ddp trainer.devices=2": r"trainer\.strategy=ddp: must be ddp_fork with several devices",
    "model.attention.num_kv_heads=3": r"model\.attention\.num_kv_heads=3: must divide model\.attention\.num_heads=8",
    "model.attention.head_dim=7": r"model\.attention\.head_dim=7: must be even",
    "model.dense_layers=[0]": r"model\.dense_hidden=0: must be positive, as model\.dense_layers=\[0\]",
    "model.dense_layers=[4] model.dense_hidden=8": r"model\.dense_layers=\[4\]: model\.num_layers=4 layers",
    "system.visible.text=[unt]": r"system\.visible\.text=unt: no such router; did you mean 'und'\?",
    "~system.visible.text": r"system\.visible\.text=\[\]: every kind must see a router",
    "+system.visible.txt=[und]": r"system\.visible\.txt: no such kind of token; did you mean 'text'\?",
    "++system.routers={a:und}": r"system\.routers=a: no column set scores the pool gen",
    "++system.routers={a:und,b:gn}": r"system\.routers\.b=gn: no such pool in system\.pools; did you mean 'gen'\?",
    "system=multi_gate system.visible.vit=[gate_vit,gate_vae]": r"sees two column sets of the pool all",
    "system=dense ~system.shared.all": r"system\.pools=\{\}: without pools, system\.shared must name an expert",
    "system.shared.all=[txt]": r"system\.shared\.all=txt: no such kind of token; did you mean 'text'\?",
    "system.streams.all=[text,vit]": r"system\.streams=\{all\}: the kind prompt must be in exactly one stream",
    "+system.pools.A-b=0.1": r"system\.pools=A-b: a name must be lower-case",
    # shielding
    "system.shield.mode=strong": r"system\.shield\.mode='strong': must be one of none, output, weights, strict",
    "system=mot system.shield.mode=output": r"system\.shield\.mode=output: system=mot has no shield targets",
    "+system.shield.targets.shard=[vae]": r"system\.shield\.targets\.shard: no such component .*'shared'\?",
    "system.shield.targets.shared=[vea]": r"system\.shield\.targets\.shared=vea: no such kind .*'vae'\?",
    "phases.shield_steps=-1": r"phases\.shield_steps=-1: must be at least 0",
    "phases.shield_steps=500": r"phases\.shield_steps=500: must be at most phases\.steps=450",
    "phases.release_scale=1.5": r"phases\.release_scale=1\.5: must lie in \[0, 1\]",
    "phases.list=[]": r"phases\.list=\[\]: must hold at least one phase",
    "phases.list=[{name:a,until:9},{name:b,until:5}]": r"phases\.list\[1\]\.until=5: must be above 9",
    "phases.list=[{name:a,until:9}]": r"phases\.list\[0\]\.until=9: the last phase must end at phases\.steps=450",
    "phases.list=[{name:a,untill:9}]": r"phases\.list\[0\]\.untill: no such key; did you mean 'until'\?",
    "phases.list=[{name:a,until:450,shield:2}]": r"phases\.list\[0\]\.shield=2\.0: must lie in \[0, 1\]",
    # the vision tower
    "vision=tower": r"model\.vision\.path: missing",
    "vision=tower model.vision.path=none": r"model\.vision\.path=none: no such file or folder; must hold the weights",
    "vision=tower model.vision.path=. model.vit_dim=5": r"model\.vit_dim=5: is known from model\.vision; must be null",
    "vision=tower model.vision.path=. +data.vision._target_=symbiotic.images.vision.VisionEncoder": r"model\.vision ",
    "vision=tower model.vision.path=. model.vision.resize=cut": r"model\.vision\.resize='cut': must be one of squash",
    "vision=towr": r"vision=towr: no such option; did you mean 'tower'\?",
    "projector_hidden=64": r"projector_hidden=64: no such key",
    "model.projector_hidden=0": r"model\.projector_hidden=0: must be at least 1",
    # rates, mix, data
    "rates.by_role.genn=1e-3": r"rates\.by_role\.genn=1e-3: no such key; did you mean 'rates\.by_role\.gen'\?",
    "+rates.by_role.genn=1e-3": r"rates\.by_role=genn: no such role; did you mean 'gen'\?",
    "rates.by_role.gen=-1": r"rates\.by_role\.gen=-1\.0: must be positive",
    "rates.roles.latent=[]": r"rates\.roles: parameter 'latent_in\.weight' is covered by no role",
    "rates.roles.und=['moe']": r"rates\.roles: parameter 'blocks\.0.*' matches the roles und, ",
    "rates.roles.und=['(']": r"rates\.roles\.und=\(: no regular expression",
    "+rates.optimizer.lr=1": r"rates\.optimizer\.lr=1: set rates\.lr in its place",
    "mix.weights.lm=-1": r"mix\.weights\.lm=-1\.0: must not be negative",
    "+mix.weights.lmm=1": r"mix\.weights=lmm: no such set in data\.sets; did you mean 'lm'\?",
    "mix.drop=[t2]": r"mix\.drop=t2: no such set in mix\.weights; did you mean 't2i'\?",
    "mix.drop=[t2i,t2i_long,lm,mmu]": r"mix\.drop=.*: nothing is left of mix\.weights",
    "trainer=ddp": r"data\.micro_batches=1: must be a multiple of the 2 devices .*set data\.micro_batches=2",
    "trainer.devices=auto": r"trainer\.devices=auto: must be a whole number",
    "+trainer.max_step=3": r"trainer\.max_step: no argument of lightning\.Trainer; did you mean 'max_steps'\?",
    "+trainer.max_steps=3": r"trainer\.max_steps=3: must not be set; it follows from phases\.steps",
    # start and folders
    "init.checkpoint=none.ckpt": r"init\.checkpoint=none\.ckpt: no such file",
    "init=checkpoint": r"init\.checkpoint: missing",
    "init.stage0=null": r"init\.checkpoint=null: must be the path of a checkpoint",
    f"paths.runs={__file__}": r"paths\.runs=.*: no run folder can be made: .*test_bad_input\.py is a file",
    f"paths.data={__file__}/x": r"paths\.data=.*test_bad_input\.py is a file, not a folder",
    "paths.runs=/proc/self/task": r"paths\.runs=/proc/self/task: cannot write a run folder in /proc/",
    # set on purpose, without effect
    "system=standard_moe phases.shield_steps=100": r"phases\.shield_steps=100: has no effect: system=standard_moe",
    "system.shield.mode=none phases.release_scale=.2": r"phases\.release_scale=\.2: has no effect",
    "phases=none phases.shield_steps=9": r"phases\.shield_steps=9: has no effect: no entry of phases\.list",
    "system.shield.mode=none system.shield.targets.shared=[vit]": r"targets\.shared=\[vit\]: has no effect: .*mode",
    "system=standard_moe model.gen_fraction=.25": r"model\.gen_fraction=\.25: has no effect: no pool",
    "system=standard_moe ablation=ratio_3_1": r"ablation=ratio_3_1: has no effect \(through model\.gen_fraction\)",
    "system=standard_moe init.assignment=random": r"init\.assignment=random: has no effect: .*no pools to split",
    "system=standard_moe rates.by_role.gen=1e-3": r"rates\.by_role\.gen=1e-3: has no effect: .*role gen",
    "system=dense objective.balance_weight=1": r"objective\.balance_weight=1: has no effect: .*no routed experts",
    "mix=und_only objective.time_mean=1": r"objective\.time_mean=1: has no effect: the mix trains no generation",
    "model.dense_hidden=3": r"model\.dense_hidden=3: has no effect: model\.dense_layers is empty",
    f"init.checkpoint={__file__} init.stage0.lr=1e-3": r"init\.stage0\.lr=1e-3: has no effect: no stage 0 is trained",
    "ablation=ratio_3_1 model.gen_fraction=.5": r"ablation=ratio_3_1: its model\.gen_fraction=0\.25 is overridden",
    # what may be built
    "rates.optimizer._target_=os.system": r"rates\.optimizer\._target_=os\.system: not allowed",
    "callbacks.progress._target_=symbiotic.callbacks.progress.Progres": r"no such class; did you mean 'Progress'\?",
    "callbacks.progress._target_=symbiotic.callbacks.progres.Progress": r"no such module; did you mean 'progress'\?",
    "+callbacks.progress.evry=3": r"callbacks\.progress\.evry: no such argument of .*did you mean 'every'\?",
    "+callbacks.mine={a:1}": r"callbacks\.mine: must be null or a mapping with the key _target_",
    "+logger.csv._partial_=true": r"logger\.csv\._partial_=True: not allowed",
    # the optimiser's arguments, callbacks, words of the trainer
    "rates.optimizer.betas=[0.9,1.5]": r"rates\.optimizer\.betas=\[0\.9,1\.5\]: must be two numbers in \[0, 1\)",
    "rates.optimizer.betas=0.9": r"rates\.optimizer\.betas=0\.9: must be two numbers",
    "rates.optimizer.eps=-1": r"rates\.optimizer\.eps=-1: must be a number, at least 0",
    "rates.optimizer.eps=tiny": r"rates\.optimizer\.eps=tiny: must be a number",
    "rates.optimizer.weight_decay=-0.1": r"rates\.optimizer\.weight_decay=-0\.1: must be a number, at least 0",
    "rates.optimizer.weight_decay=inf": r"rates\.optimizer\.weight_decay=inf: must be a number",
    "rates.optimizer.fused=yes_please": r"rates\.optimizer\.fused=yes_please: must be true, false or null",
    "+rates.optimizer.foreach=true": r"rates\.optimizer\.foreach=true: is not to be had with .*fused=true",
    "+rates.optimizer.beta=0.9": r"rates\.optimizer\.beta: no such argument of torch\.optim\.AdamW; .*'betas'",
    "rates.optimizer._target_=torch.optim.AdamX": r"_target_=torch\.optim\.AdamX: no such class; did you mean 'Adam",
    f"{NO_ADAM} rates.optimizer._target_=torch.optim.SGD +rates.optimizer.momentum=1": r"momentum=1: must be a number",
    "rates.clip=-1": r"rates\.clip=-1\.0: must be at least 0",
    "callbacks.step_log.every=-1": r"callbacks\.step_log\.every=-1: must be a whole number, at least 0",
    "callbacks.step_log.every=often": r"callbacks\.step_log\.every='often': must be int",
    "callbacks.routing_monitor.per_layer=7": r"callbacks\.routing_monitor\.per_layer=7: must be bool",
    "callbacks.collapse_alarm.patience=x": r"callbacks\.collapse_alarm\.patience='x': must be int",
    "callbacks.finite_check.policy=ignore": r"finite_check\.policy=ignore: no such policy; .*stop",
    "callbacks.finite_check.limit=0": r"finite_check\.limit=0: must be at least 1",
    "+callbacks.progres=null": r"callbacks\.progres=null: has no effect: .*did you mean 'progress'",
    "+logger.tensorbord=null": r"logger\.tensorbord=null: has no effect: .*did you mean 'tensorboard'",
    "trainer.accelerator=cup": r"trainer\.accelerator=cup: must be one of auto, cpu, ",
    "trainer.precision=bf17": r"trainer\.precision=bf17: must be one of 32-true, ",
    # data that are not there
    "data=shards data.source.shards=[none] data.source.tokenizer=none": r"data\.source\.tokenizer=none: no such file",
    f"data=shards data.source.shards=[/none/x] data.source.tokenizer={__file__}": r"shards=/none/x: no such file; must",
    f"data=shards data.source.shards=[/dev/null] data.source.tokenizer={__file__}": r"=/dev/null: no plain file; must",
    sources("sources", "none"): r"data\.source\.sources\.t2i\.files=none: no such file; must be files \(\.jsonl, ",
    sources("stream", "[none]"): r"data\.source\.sources\.t2i\.files=none: no such file",
    "data.encoded=[none]": r"data\.encoded=none: no such folder; src/encode_shards\.py writes one",
}

MEMBERS = {  # wrong as one member of a multirun
    "system=standard_moe,symbiotc": r"system=symbiotc: no such option; .* \(member 2 of 2: .*symbiotc\)",
    "seed=0,1 model.router.top_k=2,9": r"top_k=9: .* \(member 2 of 4: .*seed=0 model\.router\.top_k=9\)",
    "system=symbiotic,standard_moe phases.shield_steps=4": r"phases\.shield_steps=4: has no effect: .* \(member 2",
    "seed=0,-1": r"seed=-1: must be at least 0 \(member 2 of 2: .*seed=-1\)",
    "seedz=0,1": r"seedz=0: no such key; did you mean 'seed'\? \(member 1 of 2: .*seedz=0\)",
    "init.checkpoint=null,none.ckpt": r"init\.checkpoint=none\.ckpt: no such file \(member 2 of 2",
    "seed=0,0": r"seed=0: the same run folder as .*seed=0",
    "threads=1,2": r"threads=2: the same run folder as .*threads=1",
    "rates.lr=interval(0,1)": r"BasicSweeper does not support sweep type",
    "ablation=none,ratio_3_1 model.gen_fraction=.5": r"ablation=ratio_3_1: its .* is overridden .* \(member 2 of 2",
}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs", "data", "cache"):
        monkeypatch.setenv(f"SYMBIOTIC_{name.upper()}", str(tmp_path / name))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line; checks that it is one, and that nothing was written."""
    before = sorted(Path.cwd().rglob("*"))
    assert launch(get_args_parser().parse_args(arguments)) == WRONG_CONFIG
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert sorted(Path.cwd().rglob("*")) == before
    return err


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return answers(WRONG, tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_config_is_one_line_before_torch_is_imported(line: str, answered: dict[str, list[Any]]) -> None:
    assert amiss(answered[line], WRONG[line]) is None


@pytest.mark.parametrize("line", MEMBERS)
def test_a_wrong_member_stops_the_multirun_before_it_starts(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(MEMBERS[line], refused(["-m", "experiment=smoke", *line.split()], capsys))


# --------------------------------------------------------------------------- wrong YAML files

YAML = {
    "model/mine.yaml": {
        "defaults: [embedded]\nwidht: 3\n": r"model\.widht: no such key; did you mean 'width'\?",
        "defaults: [embedded]\nwidth: wide\n": r"model\.width='wide': must be int",
        "defaults: [embeded]\n": r"model=embeded: no such option; did you mean 'embedded'\?",
        "defaults: [embedded]\nwidth: ${model.widht}\n": r"model\.width: Interpolation key 'model\.widht' not found",
        "defaults: [embedded]\nattention: {heads: 3}\n": r"model\.attention\.heads: no such key",
        "width: [3\n": r"YAML: .*mine\.yaml",
        "width: 3\nwidth: 4\n": r"YAML: .*duplicate key width",
        "- 3\n": r"model=\[3\]: must be a mapping",
    },
    "callbacks/mine.yaml": {
        "progress: {_target_: symbiotic.callbacks.progress.Progress, evry: 3}\n": r"progress\.evry: no such argument",
        "progress: {target: symbiotic.callbacks.progress.Progress}\n": r"callbacks\.progress: must be null or a",
        "progress: {_target_: builtins.eval, source: '1'}\n": r"_target_=builtins\.eval: not allowed",
        "progress: 3\n": r"callbacks\.progress=3: must be a mapping",
    },
    "phases/mine.yaml": {
        "steps: 9\nshield_steps: 3\nrelease_scale: 0\nlist: [{name: a, until: 9, sheild: 1}]\n": r"mean 'shield'",
        "steps: 9\nshield_steps: 3\nrelease_scale: 0\nlist: {a: 9}\n": r"phases\.list=.*: must be a list",
    },
    "experiment/mine.yaml": {
        "# @package _global_\nhydra: {callbacks: {x: {_target_: logging.FileHandler, filename: out, mode: w}}}\n": (
            r"hydra\.callbacks=\['x'\]: must be empty"
        ),
        "# @package _global_\nhydra: {job_logging: {handlers: {x: {class: logging.FileHandler, filename: out}}}}\n": (
            r"hydra\.job_logging: logging\.FileHandler: must print, and do nothing else"
        ),
    },
    "trainer/mine.yaml": {
        "accelerator: cpu\ndevice: 2\n": r"trainer\.device: no argument of .* did you mean 'devices'\?",
    },
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file in YAML for text in YAML[file]])
def test_a_wrong_yaml_file_is_one_line(
    file: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "conf" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    group = path.parent.name
    assert re.search(YAML[file][text], refused(["--config-dir", str(tmp_path / "conf"), f"{group}=mine"], capsys))


# --------------------------------------------------------------------------- the command itself

PROBE = """
import runpy, sys
sys.argv = ["train.py", *sys.argv[1:]]
sys.path.insert(0, "src")
try:
    runpy.run_path("src/train.py", run_name="__main__")
except SystemExit as stop:
    print(stop.code, sorted({"torch", "lightning", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["system=symbiotc"],
        ["phases.shield_stepz=3"],
        ["model.router.top_k=9"],
        ["-m", "experiment=smoke", "system=mot,bagle", "seed=0,1"],
        ["--foo"],
        ["--experimental-rerun", "job.pickle"],
        ["--cfg", "job", "experiment=smok"],
    ],
)
def test_the_command_refuses_before_it_imports_torch(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROBE, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.stdout == "2 []\n"
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (["--help"], "system: bagel, dense, mot"),
        (["--cfg", "job", "experiment=smoke"], "name: smoke"),
        (["--cfg", "job", "--resolve", "experiment=smoke", "system=mot"], "/smoke/mot-"),
        (["--hydra-help"], "Hydra"),
    ],
)
def test_hydras_own_flags_work(arguments: list[str], shows: str, tmp_path: Path) -> None:
    command = [sys.executable, "src/train.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.returncode == 0, done.stderr
    assert shows in done.stdout
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- while running


def test_expected_failures_are_one_line_and_bugs_are_not() -> None:
    class DataError(ValueError):
        pass

    assert one_line(ConfigError("a=1:\n  must be 2")) == "a=1: must be 2"
    assert one_line(RunError("gone")) == "gone"
    assert one_line(DataError("shard t2i-00000.tar: truncated")) == "shard t2i-00000.tar: truncated"
    assert "disk is full: x" in str(one_line(OSError(28, "No space left on device", "x")))
    assert one_line(ValueError("a bug")) is None
    assert one_line(OSError(2, "No such file", "x")) is None


def test_a_failing_member_is_one_line_and_leaves_the_others_alone(
    shared_tmp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data", "cache"):
        monkeypatch.setenv(f"SYMBIOTIC_{name.upper()}", str(shared_tmp / name))
    parent = tmp_path / "parent.safetensors"
    parent.write_text("no checkpoint")
    overrides = ["phases.steps=2", "phases.shield_steps=1", "evaluation.every=0", f"init.checkpoint={parent},null"]
    command = [sys.executable, "src/train.py", "-m", "experiment=smoke", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(parent) in errors[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert len(list(tmp_path.glob("runs/smoke/*/summary.json"))) == 1
