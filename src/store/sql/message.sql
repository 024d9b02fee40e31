-- One message by its id.
-- $1 id
select id, uid, topic, part, key, headers, payload, appended_at from shardmq.message($1)
