-- When the first message at or after an id of its partition was appended.
-- $1 partition  $2 id
select shardmq.next_appended_at($1, $2::bigint - 1)
