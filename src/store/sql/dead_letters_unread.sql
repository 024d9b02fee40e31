-- How many dead letters have no payload, since their message could not be read. Null leaves a condition out.
-- Primary key, or index dead_letter_group.
-- $1 ids  $2 topic  $3 group  $4 partition  $5 text of the last error  $6 died until
select count(*)
  from shardmq.dead_letter d
 where d.payload is null
   and ($1::bigint[] is null or d.id = any ($1))
   and ($2::text is null or d.topic = $2)
   and ($3::text is null or d.group_name = $3)
   and ($4::int is null or d.partition = $4)
   and ($5::text is null or strpos(d.failures -> -1 ->> 'error', $5) > 0)
   and ($6::timestamptz is null or d.died_at <= $6)
