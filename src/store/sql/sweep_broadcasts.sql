-- Removes groups of broadcast consumers that are gone.
-- $1 this machine's clock  $2 groups whose consumers live, by what control hears of them
select shardmq.sweep_broadcasts(interval '10 minutes', $1, $2)
