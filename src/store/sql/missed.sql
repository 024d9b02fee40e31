-- How many messages after a position were dropped by retention.
-- $1 partition  $2 position
select shardmq.missed($1, $2)
