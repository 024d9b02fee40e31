-- Takes a message back that no relay has taken yet. Primary keys.
-- $1 id
select shardmq.cancel($1)
