"""Names of TRL, transformers, vLLM, PEFT and verl that estune does not have, and an answer for each.

`OPTIONS` answers options on the command line, in YAML files and in `ESConfig`; `ARGUMENTS` answers the arguments of a
trainer's constructor, and `ATTRIBUTES` a trainer's attributes and methods. `docs/trl.md` shows all three.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from estune.errors import UserError, nearest

# A flag of the commands that take options of a run (train, evaluate, score, probe, plan). Only there a reason without a
# flag is an answer.
OF_A_RUN = "--reward_funcs"
Entry = tuple[str, str]  # names, with spaces between them and `*` for any text; the answer

_NO_ADAPTERS = "there are no adapters: all parameters are trained"
_NO_BEAMS = "there is no beam search: --temperature 0 decodes greedily, and above 0 it samples"
_NO_DATALOADER = "all rows are in memory: there is no dataloader"
_NO_GRADIENTS = "es computes no gradients; for a method that does, give it in --method_kwargs"
_NO_KL = "es has no KL term, see --weight_decay with --weight_decay_anchor base; for other methods --method_kwargs"
_NO_LOSS = "es has no loss function; for grpo give it in --method_kwargs"
_NO_OPTIMIZER = "es has no optimizer; for a method that has one, give it in --method_kwargs"
_NO_PENALTIES = "the decoder changes no logits: score in a reward what you would forbid"
_NO_SHARDS = "ES has no optimizer to shard: use --num_workers, or --engine vllm --tensor_parallel_size"
_NO_SPECULATION = "there is no speculative decoding"
_NO_TOOLS = "a rollout is one completion without tools or further turns"
_OWN_DECODING = "estune decodes with its own loop and cache; --prompts_per_batch limits one forward pass"
_OWN_VLLM = "estune starts vLLM itself, in its own process: --engine vllm"
_OWN_VLLM_OPTIONS = "with --engine vllm this option keeps vLLM's default"
_PPO = "for --method ppo give it in --method_kwargs"
_REWARD_MODEL = "use --reward_funcs with the directory or hub id of a sequence classifier with one label"
_OF_THE_MODEL = "special tokens are those of generation_config and tokenizer; --stop_strings also end a completion"

# Titles of the groups of options, and their entries. An answer is one or more clauses with "; " between them. A command
# shows the clauses whose flags it has.
OPTIONS: dict[str, tuple[Entry, ...]] = {
    "Steps and batches": (
        ("num_train_epochs num_epochs epochs max_epochs total_epochs trainer.total_epochs",
         "use --max_steps, counted in steps of --batch_size prompts"),
        ("total_training_steps total_steps trainer.total_training_steps", "use --max_steps"),
        ("total_episodes", "use --max_steps: a step has --batch_size prompts"),
        ("per_device_train_batch_size per_gpu_train_batch_size train_batch_size data.train_batch_size",
         "use --batch_size, the prompts of a step on all devices together"),
        ("gradient_accumulation_steps generation_batch_size data.gen_batch_size",
         "use --batch_size, the prompts of a whole step"),
        ("num_iterations", "es updates once from a step's prompts; for grpo and rloo give it in --method_kwargs"),
        ("steps_per_generation", "a step generates once, for --batch_size prompts; for grpo and rloo give it in "
         "--method_kwargs"),
        ("mini_batch_size ppo_mini_batch_size actor_rollout_ref.actor.ppo_mini_batch_size", "a step makes one update "
         "from all its prompts; for --method ppo give num_mini_batches in --method_kwargs"),
        ("per_device_eval_batch_size per_gpu_eval_batch_size eval_batch_size val_batch_size data.val_batch_size "
         "micro_batch_size local_rollout_forward_batch_size",
         "use --prompts_per_batch, the prompts in one forward pass"),
        ("auto_find_batch_size", "with --noise lowrank --members_per_batch auto fits the members into memory; "
         "--prompts_per_batch limits the prompts"),
        ("popsize npop num_members num_perturbations", "did you mean --population_size?"),
        ("noise_std noise_scale zo_eps", "did you mean --sigma?"),
    ),
    "Data and prompts": (
        ("dataset", "use --dataset_name"),
        ("train_file train_files data_files data_path data.train_files",
         "use --dataset_name: a file, a directory or an id on the hub; --dataset_train_split names the split"),
        ("validation_file val_files eval_file test_file eval_dataset data.val_files data.test_files",
         "use --dataset_name: a directory or an id on the hub; --dataset_test_split names the split to evaluate on"),
        ("dataset_config_name dataset_subset", "use --dataset_config"),
        ("dataset_split train_split", "use --dataset_train_split"),
        ("eval_split test_split", "use --dataset_test_split"),
        ("dataset_streaming streaming", "a run shuffles all rows, so a stream is read to its end"),
        ("max_train_samples data.train_max_samples", "all rows of a dataset are trained on: give a smaller one"),
        ("max_eval_samples data.val_max_samples",
         "--eval_rows limits the evaluations of a run; --limit limits estune evaluate"),
        ("dataset_text_field prompt_column text_column data.prompt_key",
         "use --column_mapping, such as {\"prompt\": \"question\"}"),
        ("remove_unused_columns data.reward_fn_key", "reward functions receive every column"),
        ("shuffle_dataset shuffle data.shuffle train_sampling_strategy group_by_length length_column_name",
         "rows are always shuffled, by --seed"),
        ("dataset_num_proc dataset_kwargs dataloader_* preprocessing_num_workers", _NO_DATALOADER),
        ("max_prompt_length data.max_prompt_length max_seq_length truncation_mode data.truncation "
         "data.filter_overlong_prompts", "prompts are never cut"),
        ("packing packing_strategy padding_free eval_packing assistant_only_loss completion_only_loss",
         "training is on whole completions: nothing is packed or masked"),
        ("pad_to_multiple_of", "prompts are padded to the longest of a forward pass"),
        ("chat_template chat_template_path", "the tokenizer's is used, see --apply_chat_template"),
        ("data.return_raw_chat add_generation_prompt", "see --apply_chat_template"),
        ("image_key data.image_key data.video_key limit_mm_per_prompt", "prompts are text: there are no images"),
        ("data.*", "rows are those of --dataset_name; --column_mapping names their columns"),
    ),
    "Model and precision": (
        ("actor_rollout_ref.model.path model_id pretrained sft_model_path", "use --model"),
        ("bf16 bf16_full_eval", "use --dtype bfloat16"),
        ("fp16 fp16_full_eval half", "use --dtype float16"),
        ("torch_dtype mixed_precision actor_rollout_ref.rollout.dtype", "use --dtype"),
        ("tf32", "torch's own setting stands: set torch.backends.cuda.matmul.allow_tf32 from Python"),
        ("fp8", "the compute dtype is --dtype: float32, bfloat16 or float16"),
        ("cast_lm_head_to_fp32", "--dtype float32 computes everything in float32"),
        ("model_init_kwargs config_name", "use --dtype, --revision and --trust_remote_code, or give ESTrainer a "
         "model in memory"),
        ("attn_implementation use_flash_attention_2", "transformers' default is used; a model in memory, given to "
         "ESTrainer, keeps its own"),
        ("device_map", "use --device; --engine vllm --tensor_parallel_size splits a model"),
        ("tokenizer tokenizer_name tokenizer_name_or_path tokenizer_mode", "the model's own tokenizer is used; "
         "ESTrainer takes another as processing_class"),
        ("low_cpu_mem_usage max_memory", "theta is in float32 and takes 4 bytes a parameter; estune plan estimates "
         "a run's memory"),
        ("use_liger_kernel liger_kernel_config", _NO_GRADIENTS),
        ("torch_compile torch_compile_backend torch_compile_mode", "the model is not compiled; for a method with "
         "gradients give it in --method_kwargs"),
        ("disable_dropout", "members run in evaluation mode, without dropout; for grpo and rloo give it in "
         "--method_kwargs"),
        ("router_aux_loss_coef", _NO_LOSS),
        ("actor_rollout_ref.model.enable_gradient_checkpointing actor_rollout_ref.model.enable_activation_offload",
         "es computes no gradients"),
        ("actor_rollout_ref.model.*", "the model is --model"),
    ),
    "Adapters and quantization": (
        ("use_peft peft_config lora_* use_rslora use_dora target_modules modules_to_save adapter_name_or_path "
         "enable_lora max_lora_rank actor_rollout_ref.model.lora_* actor_rollout_ref.model.target_modules",
         f"{_NO_ADAPTERS}; --trainable_parameters limits them; --noise lowrank makes perturbations cheap"),
        ("load_in_4bit load_in_8bit bnb_* use_bnb_nested_quant quantization quantization_config",
         "a quantized model cannot be trained: theta is in float32; --dtype bfloat16 halves the memory of the working "
         "model"),
    ),
    "Optimizer and gradients": (
        ("lr alpha actor_lr actor_rollout_ref.actor.optim.lr", "did you mean --learning_rate?"),
        ("critic_lr", "es has no critic"),
        ("warmup_ratio actor_rollout_ref.actor.optim.lr_warmup_steps_ratio", "use --warmup_steps, a number of steps"),
        ("actor_rollout_ref.actor.optim.lr_warmup_steps num_warmup_steps", "use --warmup_steps"),
        ("actor_rollout_ref.actor.optim.weight_decay", "use --weight_decay"),
        ("adam_beta1 adam_beta2 adam_epsilon optim optim_args optim_target_modules lr_scheduler_kwargs", _NO_OPTIMIZER),
        ("beta1 beta2", "es has no optimizer; for a method that has one, give adam_beta1 or adam_beta2 in "
         "--method_kwargs"),
        ("optimizer", "es has no optimizer; for a method that has one, give optim in --method_kwargs"),
        ("grad_clip actor_rollout_ref.actor.grad_clip",
         "es computes no gradients; for grpo and rloo give max_grad_norm in --method_kwargs"),
        ("max_grad_norm neftune_noise_alpha gradient_checkpointing "
         "gradient_checkpointing_kwargs activation_offloading", _NO_GRADIENTS),
        ("label_smoothing_factor label_smoothing", "there are no labels: the reward scores completions"),
        ("actor_rollout_ref.actor.optim.*", "es has no optimizer: --learning_rate, --lr_scheduler_type, "
         "--warmup_steps and --weight_decay are what it has"),
    ),
    "Losses and advantages": (
        ("beta kl_coef kl_estimator use_bias_correction_kl", _NO_KL),
        ("init_kl_coef kl_loss_coef use_kl_loss kl_penalty kl_ctrl algorithm.kl_ctrl algorithm.kl_ctrl.* "
         "algorithm.use_kl_in_reward algorithm.kl_penalty "
         "actor_rollout_ref.actor.use_kl_loss actor_rollout_ref.actor.kl_loss_*",
         "es has no KL term, see --weight_decay with --weight_decay_anchor base; for grpo and rloo give beta in "
         "--method_kwargs, for ppo kl_coef"),
        ("sync_ref_model ref_model ref_model_mixup_alpha ref_model_sync_steps actor_rollout_ref.ref.*",
         "es has no reference model, see --weight_decay with --weight_decay_anchor base"),
        ("scale_rewards", "es shapes fitness, see --fitness_shaping; for grpo give it in --method_kwargs"),
        ("normalize_advantages reward_clip_range", "es shapes fitness, see --fitness_shaping; for rloo give it in "
         "--method_kwargs"),
        ("loss_type epsilon epsilon_high delta importance_sampling_level top_entropy_quantile "
         "off_policy_mask_threshold sapo_* vespo_* entropy_coef entropy_coef_min entropy_coef_max "
         "entropy_coef_delta entropy_target use_adaptive_entropy", _NO_LOSS),
        ("clip_ratio clip_range actor_rollout_ref.actor.clip_ratio",
         "es has no loss function; for grpo give epsilon in --method_kwargs"),
        ("mask_truncated_completions", "es scores a cut completion like any other; for grpo and rloo give it in "
         "--method_kwargs"),
        ("ppo_epochs", "for --method ppo give num_ppo_epochs in --method_kwargs"),
        ("num_ppo_epochs num_mini_batches vf_coef cliprange cliprange_value whiten_rewards "
         "missing_eos_penalty gamma lam", _PPO),
        ("adv_estimator algorithm.adv_estimator algorithm", "use --method: es, grpo, rloo or ppo"),
        ("algorithm.gamma algorithm.lam", _PPO),
        ("algorithm.*", "--method names the method, and --fitness_shaping what es makes of the rewards"),
        ("critic critic.* value_model", "es has no critic; --method ppo makes its own"),
        ("actor_rollout_ref actor_rollout_ref.actor.*", "es has no policy gradient; for grpo, rloo and ppo, the "
         "argument in TRL goes into --method_kwargs"),
    ),
    "Rewards and environments": (
        ("reward_model reward_model_path reward_model_name_or_path reward_model.*", _REWARD_MODEL),
        ("reward_function reward_fn custom_reward_function custom_reward_function.* reward.custom_reward_function.*",
         "use --reward_funcs, as path/file.py:function"),
        ("multi_objective_aggregation", "rewards are summed, see --reward_weights"),
        ("max_tool_calling_iterations tools environment_factory rollout_func actor_rollout_ref.rollout.multi_turn "
         "actor_rollout_ref.rollout.multi_turn.* enable_auto_tool_choice", _NO_TOOLS),
    ),
    "Generation": (
        ("max_new_tokens max_tokens response_length max_response_length data.max_response_length "
         "actor_rollout_ref.rollout.response_length", "use --max_completion_length"),
        ("max_length", "use --max_completion_length, which does not count the prompt"),
        ("min_length min_new_tokens min_tokens", "a completion has no least length"),
        ("n", "completions per prompt are --num_generations"),
        ("num_return_sequences rollout_n best_of actor_rollout_ref.rollout.n", "use --num_generations"),
        ("temp actor_rollout_ref.rollout.temperature", "use --temperature"),
        ("actor_rollout_ref.rollout.top_p", "use --top_p"),
        ("actor_rollout_ref.rollout.top_k", "use --top_k"),
        ("do_sample actor_rollout_ref.rollout.do_sample", "use --temperature: 0 decodes greedily, and above 0 samples"),
        ("min_p typical_p top_h top_n epsilon_cutoff eta_cutoff",
         "the sampler does not have it: use --top_p or --top_k"),
        ("stop stop_sequences stop_words", "use --stop_strings"),
        ("eos_token pad_token eos_token_id pad_token_id bos_token_id stop_token stop_token_id stop_token_ids "
         "ignore_eos", _OF_THE_MODEL),
        ("num_beams num_beam_groups diversity_penalty length_penalty constraints force_words_ids penalty_alpha "
         "dola_layers low_memory use_beam_search", _NO_BEAMS),
        ("early_stopping", "there is no beam search; --early_stopping_patience ends a run early"),
        ("repetition_penalty presence_penalty frequency_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
         "encoder_repetition_penalty bad_words_ids sequence_bias suppress_tokens begin_suppress_tokens "
         "forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty logit_bias logits_processor "
         "allowed_token_ids guidance_scale renormalize_logits remove_invalid_values watermarking_config "
         "token_healing vllm_structured_outputs_regex structured_outputs guided_decoding", _NO_PENALTIES),
        ("assistant_* is_assistant assistant_model speculation_type prompt_lookup_num_tokens num_assistant_tokens "
         "num_assistant_tokens_schedule target_lookbehind max_matching_ngram_size use_mtp speculative_config",
         _NO_SPECULATION),
        ("output_attentions output_hidden_states output_scores output_logits return_dict_in_generate logprobs "
         "prompt_logprobs", "reward functions receive texts and token ids, and no scores"),
        ("use_cache", "the key-value cache is always used"),
        ("cache_implementation cache_config max_cache_len prefill_chunk_size compile_config disable_compile "
         "continuous_batching_config generation_kwargs use_transformers_continuous_batching use_transformers_paged "
         "transformers_continuous_batching_config", _OWN_DECODING),
        ("max_time", "--max_time_s ends a run; --max_completion_length ends a completion"),
        ("decoder_start_token_id", "the model must be a causal language model, without an encoder"),
        ("transformers_version", "transformers writes it into files: it is no setting"),
        ("num_generations_eval actor_rollout_ref.rollout.val_kwargs.n", "evaluations of a run use --num_generations, "
         "or one greedy completion with --eval_greedy"),
        ("actor_rollout_ref.rollout.val_kwargs.*", "evaluations of a run sample as its training does; --eval_greedy "
         "makes them greedy"),
        ("actor_rollout_ref.rollout.*", "the options of completions are --max_completion_length, --num_generations, "
         "--temperature, --top_p and --top_k"),
    ),
    "vLLM": (
        ("use_vllm actor_rollout_ref.rollout.name", "use --engine vllm"),
        ("vllm_tensor_parallel_size tensor_model_parallel_size tp_size "
         "actor_rollout_ref.rollout.tensor_model_parallel_size", "use --engine vllm --tensor_parallel_size"),
        ("pipeline_parallel_size data_parallel_size", "--engine vllm has --tensor_parallel_size; --num_workers starts "
         "several engines"),
        ("gpu_memory_utilization vllm_gpu_memory_utilization actor_rollout_ref.rollout.gpu_memory_utilization "
         "max_model_len vllm_max_model_length max_num_seqs max_num_batched_tokens swap_space cpu_offload_gb "
         "kv_cache_dtype block_size enable_chunked_prefill load_format", _OWN_VLLM_OPTIONS),
        ("enforce_eager actor_rollout_ref.rollout.enforce_eager", "--engine vllm is always eager: a captured graph "
         "would not see the members"),
        ("enable_prefix_caching", "--engine vllm caches no prefixes: they belong to other weights"),
        ("vllm_importance_sampling_*", "es needs no importance weights: it updates by seeds and rewards"),
        ("vllm_*", _OWN_VLLM),
    ),
    "Devices and processes": (
        ("use_cpu no_cuda cpu", "use --device cpu"),
        ("cuda gpu", "use --device cuda"),
        ("num_processes num_machines world_size gpus num_gpus n_gpu nnodes trainer.nnodes n_gpus_per_node "
         "trainer.n_gpus_per_node", "use --num_workers, and --tensor_parallel_size with --engine vllm"),
        ("deepspeed fsdp fsdp_* ds3_gather_for_generation parallelism_config accelerator_config "
         "actor_rollout_ref.actor.fsdp_config.*", _NO_SHARDS),
        ("ddp_* local_rank ignore_bias_buffers average_tokens_across_devices save_on_each_node log_on_each_node",
         "there is no distributed training of gradients; --num_workers spreads the members over Ray workers"),
        ("data_seed full_determinism deterministic random_state", "all random numbers of a run come from --seed"),
        ("torch_empty_cache_steps", "--prompts_per_batch and --members_per_batch limit the memory of a forward pass"),
        ("skip_memory_metrics", "estune plan estimates a run's memory"),
    ),
    "Evaluation": (
        ("eval_strategy evaluation_strategy do_eval test_freq trainer.test_freq", "use --eval_steps"),
        ("eval_delay eval_on_start val_before_train trainer.val_before_train",
         "with --eval_steps the first evaluation is before step 1"),
        ("do_train do_predict", "estune train trains, and estune evaluate evaluates"),
        ("eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics "
         "prediction_loss_only include_for_metrics include_inputs_for_metrics label_names",
         "an evaluation reports accuracy and rewards of completions, without labels and loss"),
    ),
    "Saving and resuming": (
        ("save_strategy save_freq trainer.save_freq", "use --save_steps"),
        ("trainer.max_actor_ckpt_to_keep", "use --save_total_limit"),
        ("save_only_model", "a checkpoint of es is a model: there is no optimizer state"),
        ("save_safetensors", "models are always saved as safetensors"),
        ("resume_from_checkpoint resume_mode trainer.resume_mode trainer.resume_from_path",
         "use --resume with --output_dir"),
        ("ignore_data_skip", "a resume continues with the row that comes next"),
        ("enable_jit_checkpoint", "SIGTERM makes es save a checkpoint before the run ends"),
        ("restore_callback_states_from_checkpoint", "a checkpoint holds no states of callbacks"),
        ("overwrite_output_dir", "use --overwrite"),
        ("logging_dir trainer.default_local_dir", "use --output_dir: all files of a run are below it"),
    ),
    "Logging and uploading": (
        ("logging_strategy logging_first_step", "use --logging_steps; the first step of es is always logged"),
        ("logging_nan_inf_filter", "a reward of NaN or infinity counts as failed, and failures are counted"),
        ("disable_tqdm", "use --console lines"),
        ("log_level log_level_replica", "there are no levels of messages"),
        ("debug", "there is no debug mode"),
        ("logger trainer.logger", "use --report_to"),
        ("experiment_name exp_name wandb_run_name trainer.experiment_name", "use --run_name"),
        ("project project_name wandb_project trainer.project_name",
         "WANDB_PROJECT, TRACKIO_PROJECT or MLFLOW_EXPERIMENT_NAME in the environment names the project"),
        ("trackio_space_id trackio_bucket_id trackio_static_space_id",
         "trackio reads TRACKIO_SPACE_ID and TRACKIO_BUCKET_ID from the environment"),
        ("include_num_input_tokens_seen include_tokens_per_second", "num_tokens in metrics.jsonl counts tokens"),
        ("num_completions_to_print num_sample_generations log_unique_prompts log_multimodal log_completions_hub_repo "
         "trainer.rollout_data_dir trainer.log_val_generations",
         "completions are files in the run directory, see --log_completions"),
        ("hub_token push_to_hub_token", "the hub's client reads HF_TOKEN from the environment, or its own login"),
        ("push_to_hub_model_id push_to_hub_organization", "use --hub_model_id"),
        ("hub_strategy hub_always_push hub_revision", "--push_to_hub uploads the finished model, once"),
        ("data trainer", "options are not nested: write each at the top level"),
        ("trainer.*", "the options of a run's course are --max_steps, --eval_steps, --save_steps and --output_dir"),
    ),
}  # fmt: skip

# Arguments of the constructors of GRPOTrainer, SFTTrainer, PPOTrainer and Trainer.
ARGUMENTS: tuple[Entry, ...] = (
    ("tokenizer", "use processing_class"),
    ("reward_func reward_function", "use reward_funcs"),
    ("dataset train_data", "use train_dataset"),
    ("eval_data test_dataset", "use eval_dataset"),
    ("config training_args", "use args=ESConfig(...)"),
    ("peft_config", f"{_NO_ADAPTERS}; ESConfig(trainable_parameters=[...]) limits them"),
    ("quantization_config", "a quantized model cannot be trained: theta is in float32"),
    ("optimizers optimizer optimizer_cls_and_kwargs lr_scheduler", "there is no optimizer: set learning_rate, "
     "lr_scheduler_type and warmup_steps in ESConfig"),
    ("data_collator", "rows are tokenized as they are: there are no batches to collate"),
    ("compute_metrics preprocess_logits_for_metrics", "a step records the mean of each reward function, an "
     "evaluation accuracy and the weighted reward"),
    ("compute_loss_func loss_func", "there is no loss function: training maximises reward_funcs"),
    ("reward_processing_classes", "a reward model has its own tokenizer, and a reward function tokenizes for itself"),
    ("reward_model reward_models",
     "use reward_funcs with the directory or hub id of a sequence classifier with one label"),
    ("value_model critic_model", "es has no critic; ESConfig(method='ppo') makes its own"),
    ("ref_model", "es has no reference model: ESConfig(weight_decay=..., weight_decay_anchor='base') pulls towards the "
     "base model"),
    ("rollout_func", "the engine makes all completions: ESConfig(engine='file.py:Class') names one of your own"),
    ("tools environment_factory", _NO_TOOLS),
    ("model_init model_init_kwargs", "give model: a name, a directory or a model in memory"),
    ("formatting_func dataset_text_field", "ESConfig(column_mapping={...}) names the columns"),
)  # fmt: skip

_NO_OPTIMIZER_HERE = "there is no optimizer: metrics.jsonl holds the learning rate of every logged step"
_NO_DATALOADER_HERE = "there is no dataloader: train_rows and eval_rows hold the rows"
_NO_LOOP = "es has no such part of a step: train() runs the whole loop"
_WRITTEN = "train() writes metrics.jsonl and trainer_state.json itself"
# Attributes and methods of Trainer and GRPOTrainer.
ATTRIBUTES: tuple[Entry, ...] = (
    ("predict", "use evaluate(); estune evaluate --rows FILE writes a model's answers"),
    ("test validate", "use evaluate()"),
    ("fit step", "use train()"),
    ("train_dataset get_train_dataset", "train_rows holds the rows"),
    ("eval_dataset get_eval_dataset", "eval_rows holds the rows"),
    ("get_train_dataloader get_eval_dataloader get_test_dataloader train_dataloader num_examples get_batch_samples "
     "data_collator", _NO_DATALOADER_HERE),
    ("optimizer lr_scheduler create_optimizer create_scheduler create_optimizer_and_scheduler get_learning_rates "
     "get_optimizer_cls_and_kwargs get_optimizer_group get_decay_parameter_names", _NO_OPTIMIZER_HERE),
    ("training_step prediction_step evaluation_loop compute_loss compute_loss_context_manager "
     "autocast_smart_context_manager control callback_handler set_initial_training_values loss_is_scaled_for_ga end "
     "get_gamma_weights get_high_entropy_mask get_off_policy_mask", _NO_LOOP),
    ("log log_metrics save_metrics save_state metrics_format", _WRITTEN),
    ("accelerator create_accelerator_and_postprocess is_deepspeed_enabled is_fsdp_enabled place_model_on_device "
     "is_in_train", "estune does not use accelerate"),
    ("is_local_process_zero", "one process trains: use is_world_process_zero()"),
    ("get_tp_size get_cp_size get_sp_size", "args.tensor_parallel_size is the number of processes of one model"),
    ("hyperparameter_search", "estune probe proposes sigma, learning rate and population size; estune compare tunes"),
    ("create_model_card", "train() writes the model card README.md into the run directory"),
    ("init_hf_repo hf_model_id", "ESConfig(push_to_hub=True) creates the repository before the run begins"),
    ("get_num_trainable_parameters", "engine.specs lists the parameters and whether each is trained"),
    ("get_total_train_batch_size", "args.batch_size is the number of prompts of a step"),
    ("floating_point_ops store_flos current_flos", "floating-point operations are not counted"),
    ("tokenizer", "use processing_class"),
    ("save_pretrained save_checkpoint", "use save_model(directory); ESConfig(save_steps=...) saves within a run"),
    ("load_checkpoint resume_from_checkpoint", "ESConfig(resume=True, output_dir=...) continues a run"),
    ("reward_funcs reward_processing_classes", "request.rewards holds the reward functions, their names and weights"),
    ("ref_model", "there is no reference model"),
    ("model_wrapped", "use model"),
    ("model_init call_model_init", "the model is loaded once, by engine"),
    ("generate generate_completions vllm_generation llm", "estune evaluate --rows FILE writes a model's answers"),
    ("compute_metrics", "a step records the mean of each reward function, an evaluation the weighted reward"),
)  # fmt: skip


def _by_name(entries: Iterable[Entry]) -> dict[str, str]:
    """Return the answer of each name and pattern; patterns come last, the longest first."""
    pairs = [(name, answer) for names, answer in entries for name in names.split()]
    return dict(sorted(pairs, key=lambda pair: ("*" in pair[0], -len(pair[0]))))


OPTION_ANSWERS = _by_name(entry for entries in OPTIONS.values() for entry in entries)
ARGUMENT_ANSWERS, ATTRIBUTE_ANSWERS = _by_name(ARGUMENTS), _by_name(ATTRIBUTES)


def flags_in(answer: str) -> list[str]:
    """Return the flags that an answer names."""
    return re.findall(r"--\w+", answer)


def option_hint(name: str, flags: Collection[str]) -> str:
    """Return ``; ANSWER`` for an unknown option, or an empty string if there is none.

    The answer is that of `OPTIONS` for the name, or else the nearest flag, or else that of a pattern in `OPTIONS`.

    Args:
        name: the option, with or without dashes.
        flags: the flags of the command. An answer has no clause with another flag, and none without a flag unless the
            command takes options of a run.
    """
    word = name.lstrip("-").replace("-", "_").lower()
    answer = None if "*" in word else OPTION_ANSWERS.get(word)
    if answer is None:
        if suggestion := nearest(name, flags):
            return suggestion
        answer = _of_pattern(word, OPTION_ANSWERS)
    clauses = [f"; {clause}" for clause in answer.split("; ") if clause]
    return "".join(clause for clause in clauses if all(flag in flags for flag in flags_in(clause) or [OF_A_RUN]))


def _of_pattern(word: str, answers: Mapping[str, str]) -> str:
    """Return the answer of the longest pattern that matches a word; an empty string if none does."""
    return next((answer for name, answer in answers.items() if "*" in name and fnmatchcase(word, name)), "")


def in_python(hint: str) -> str:
    """Return a hint with the names of options as Python has them, without dashes."""
    return hint.replace("--", "")


def unknown(kind: str, hints: Mapping[str, str]) -> str:
    """Return ``unknown KIND name; hint``, or ``unknown KINDs name (hint), name and name (hint)``.

    Args:
        kind: what the names are: option or argument.
        hints: for each name, as shown, its hint, with ``; `` before it, or an empty string.
    """
    if len(hints) == 1:
        return f"unknown {kind} " + "".join(f"{name}{hint}" for name, hint in hints.items())
    return f"unknown {kind}s {named(hints)}"


def named(hints: Mapping[str, str]) -> str:
    """Return all names with their hints in brackets; names with the same hint stand together."""
    groups: dict[str, list[str]] = {}
    for name, hint in hints.items():
        groups.setdefault(hint or name, []).append(name)  # a name without a hint stands alone
    texts = []
    for hint, names in groups.items():
        listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
        texts.append(f"{listed} ({hint.removeprefix('; ')})" if hint.startswith("; ") else listed)
    return ", ".join(texts)


def unknown_in(source: str, kind: str, hints: Mapping[str, str]) -> UserError:
    """Return the error for unknown names in a source, such as ``config 'run.yaml'`` or ``ESConfig``."""
    quoted = {repr(name): hint for name, hint in hints.items()}
    return UserError(f"{source} has {'an ' if len(quoted) == 1 else ''}{unknown(kind, quoted)}")


def command_hint(word: str) -> str:
    """Return ``; HINT`` for a command of TRL or transformers, or an empty string."""
    methods = {"grpo": "grpo", "rloo": "rloo", "ppo": "ppo", "raft": "sft_rejection"}
    if word in methods:
        return f"; use estune train: with es, or with --method {methods[word]}"
    if word in ("sft", "dpo", "kto", "reward", "orpo", "cpo"):
        return "; estune train maximises a reward: it learns from no demonstrations or preferences in data"
    if word in ("chat", "generate", "serve", "vllm-serve"):
        return "; a run is a directory that transformers and vLLM load; estune evaluate --rows FILE writes answers"
    return ""


def unknown_arguments(
    trainer: str, given: Iterable[str], arguments: Collection[str], options: Collection[str]
) -> UserError:
    """Return the error for unknown arguments of a trainer's constructor.

    Args:
        trainer: the class's name.
        given: the unknown arguments.
        arguments: the arguments that the constructor has.
        options: the fields of `ESConfig`.
    """
    hints = {}
    for name in given:
        if name in ARGUMENT_ANSWERS:
            hints[name] = f"; {ARGUMENT_ANSWERS[name]}"
        elif name in options:
            hints[name] = f"; give it as args=ESConfig({name}=...)"
        elif suggestion := nearest(name, arguments):
            hints[name] = suggestion
        else:
            hint = option_hint(name, [f"--{option}" for option in options])
            place = "; options belong in args=ESConfig(...): "
            hints[name] = in_python(hint.replace("; ", place, 1) if flags_in(hint) else hint)
    return unknown_in(trainer, "argument", hints)


def no_attribute(trainer: str, name: str, attributes: Iterable[str], options: Collection[str]) -> AttributeError:
    """Return the error for an attribute that a trainer does not have.

    Args:
        trainer: the class's name.
        name: the attribute.
        attributes: the attributes that the class has.
        options: the fields of `ESConfig`.
    """
    message = f"{trainer!r} object has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(message)
    if name in ATTRIBUTE_ANSWERS:
        return AttributeError(f"{message}; {ATTRIBUTE_ANSWERS[name]}")
    if name in options:
        return AttributeError(f"{message}; use args.{name}")
    return AttributeError(message + nearest(name, [word for word in attributes if not word.startswith("_")]))


def foreign_args(args: Any, options: Collection[str]) -> UserError:
    """Return the error for a trainer's ``args`` that are not an `ESConfig`.

    For a configuration of TRL or transformers, and for a dict, the message says of every field that differs from its
    default whether `ESConfig` has it, or what to use instead.

    Args:
        args: what was given.
        options: the fields of `ESConfig`.
    """
    kind = f"args must be an ESConfig, not {type(args).__name__}"
    changed = list(map(str, args)) if isinstance(args, Mapping) else _changed_fields(args)
    same = [name for name in changed if name in options]
    flags = [f"--{option}" for option in options]
    others = {name: in_python(option_hint(name, flags)) for name in changed if name not in options}
    if not others:
        fields = ", ".join(f"{name}=..." for name in same) or "..."
        return UserError(f"{kind}: write ESConfig({fields}), where most options have the same names")
    kept = f"has {', '.join(same)}, but not" if same else "does not have"
    return UserError(f"{kind}; of its changed fields ESConfig {kept} {named(others)}")


# Fields that TRL computes from other fields if they are not given.
_COMPUTED = ("generation_batch_size", "steps_per_generation")


def _changed_fields(args: Any) -> list[str]:
    """Return the fields of a dataclass whose values differ from their defaults; none for another object.

    A constructor may replace a default, so a value also counts as a default if a new object of the class has it.
    """
    if not dataclasses.is_dataclass(args) or isinstance(args, type):
        return []
    fresh: Any = None
    for options in ({"use_cpu": getattr(args, "use_cpu", False)}, {"use_cpu": True}, {}):  # bf16 needs a GPU or use_cpu
        try:
            fresh = type(args)(**options)
            break
        except Exception:  # the user's class, or TRL's or transformers'
            continue
    changed = []
    for spec in dataclasses.fields(args):
        value = getattr(args, spec.name, None)
        default = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
        is_default = _equal(value, default) or (fresh is not None and _equal(value, getattr(fresh, spec.name, None)))
        if spec.name in ("use_cpu", "bf16"):  # `fresh` may have another `use_cpu`, and TRL computes a missing `bf16`
            is_default = not value or (is_default and spec.name == "bf16")
        if not is_default and spec.name not in _COMPUTED:
            changed.append(spec.name)
    return changed


def _equal(one: Any, other: Any) -> bool:
    """Return whether two values are equal; False if their comparison is no bool, as that of arrays."""
    return type(one) is type(other) and (one is other or (one == other) is True)
