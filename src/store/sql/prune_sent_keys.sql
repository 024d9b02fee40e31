-- Forgets dedup keys that are older than the window, a part at a time. Goes by the index on the time.
-- $1 most rows  $2 this machine's clock
select shardmq.prune_sent_keys($1, $2)
