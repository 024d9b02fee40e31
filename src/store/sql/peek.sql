-- Messages of a partition after an id, for people.
-- $1 partition  $2 after  $3 at most
select id, uid, topic, part, key, headers, payload, appended_at from shardmq.messages($1, $2, $3)
