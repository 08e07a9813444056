# Sourced by run.sh, whose --help explains it: both arms on the same seeds, as set or as picked on a part of the train rows.

as_of_run_jepa() { # makes the arguments DATASET and MODEL those of run_jepa
  [ "${#given[@]}" -le 2 ] || fail "too many arguments: $arm takes 2, the next is '${given[2]}'"
  given=("${given[1]:-}" "" "" "" "" "" "" "${given[0]:-}")
  [[ ${given[7]:-${DATASET:-}} != *[,\ ]* ]] || fail "$arm takes one dataset, not '${given[7]:-$DATASET}'"
}

sweep_settings() { # from the environment and the defaults
  local list="[, ]*($number)([, ]+($number))*[, ]*" wholes="[, ]*($whole)([, ]+($whole))*[, ]*" usual_rates=$PAPER_RATES
  [ "$model" != "$TINY" ] || usual_rates=$TINY_RATES
  setting grid_k "$wholes" "${GRID_K:-}" "$PAPER_K"
  setting grid_lbd "$list" "${GRID_LBD:-}" "$PAPER_LBD"
  setting rates "$list" "${LEARNING_RATES:-}" "$usual_rates"
  setting sweep_seeds "$wholes" "${SWEEP_SEED:-}" 42
  setting eval_split '0?\.[0-9]+' "${EVAL_SPLIT:-}" 0.2
  setting split_seed "$whole" "${SPLIT_SEED:-}" 42
  grid_k=$(once "$grid_k") grid_lbd=$(once "$grid_lbd") rates=$(once "$rates") sweep_seeds=$(once "$sweep_seeds")
}

compare() { # seed, extra flags of both arms
  run_regular "$@"
  run_jepa "$@" ${later[@]+"${later[@]}"}
}
sweep() { compare "$@"; }

report_folder() { # extra flags
  local method=$arm details=-lr$learning_rate-lbd$lbd-k$predictors
  [ "$arm" = compare ] || details=-val$eval_split-$split_seed
  printf '%s\n' "${REPORTS_DIR:-reports}/$(folder_name "" "$@" ${later[@]+-- "${later[@]}"})"
}

report() { # of both arms' runs; extra flags
  local allow=(${ALLOW:-})
  [ -z "$protocol" ] || allow+=(reference_grad_scale) # the published arms differ in it
  supervise "$python" -m llm_jepa.report "${runs[@]}" --output_dir "$(report_folder "$@")" ${allow[@]+--allow "${allow[@]}"}
}

held_out_rows() { # trains on a part of the train rows and evaluates on the rest, instead of on the test rows
  local split=(--split_seed "$split_seed")
  test_file=$train_file
  rows=(--data_file "$train_file" --eval_split "$eval_split" "${split[@]}" --eval_strategy no)
  score_rows=(--input_file "$train_file" --process_split test --test_size "$eval_split" "${split[@]}")
}

cells() { # an arm with its present settings on each sweep seed; extra flags
  local seed
  for seed in $sweep_seeds; do "$1" "$seed" "${@:2}"; done
}

best() { # fills `picked` with the run folder of the best cell of arm $1
  finish
  picked=$("$python" -m llm_jepa.sweep --pick "$1" --output_file "$folder/sweep.json" "${runs[@]}")
}

pick() { # sets learning_rate, predictors and lbd to what is best on the held-out rows; extra flags
  local folder RUNS_DIR runs=() checked="" validation="" picked first=${sweep_seeds%%$'\n'*}
  folder=$(report_folder "$@")
  RUNS_DIR=$folder/cells validation=-val$eval_split-$split_seed
  for learning_rate in $rates; do cells run_regular "$@"; done
  best regular
  for learning_rate in $rates; do
    regular && [ "$(run_folder "$first" "$@")" != "$picked" ] || break
  done
  for predictors in $grid_k; do
    for lbd in $grid_lbd; do cells run_jepa "$@" ${later[@]+"${later[@]}"}; done
  done
  best jepa
  for predictors in $grid_k; do
    for lbd in $grid_lbd; do
      jepa && [ "$(run_folder "$first" "$@" ${later[@]+"${later[@]}"})" != "$picked" ] || break 2
    done
  done
}
