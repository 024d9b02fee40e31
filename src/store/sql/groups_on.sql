-- Groups that a node knows, without those of one consumer alone. Primary key.
-- $1 topic (null: of all)  $2 group (null: all)
select g.topic, g.group_name, g.start_at
  from shardmq.group_start g
 where ($1::text is null or g.topic = $1) and ($2::text is null or g.group_name = $2)
   and not g.broadcast
 order by g.topic, g.group_name
