-- Removes groups of broadcast consumers that are gone.
select shardmq.sweep_broadcasts(interval '10 minutes')
